"""Holders that insert prompts, extra tokens, into a block or only into its attention, and cut them out again.

Outside the blocks nothing sees the prompts: not the model's own code, nor hooks that others have put on a block. What
happens when a block is called, in this order:

    enter     pre-hook: insert the prompts
              pre-hooks of other adapters, which see the prompts as tokens
    conceal   pre-hook: cut them out again; the hooks of others see the block's own input
    forward   replaced by `PromptedForward`: the block's own forward, with the prompts
              hooks of other adapters, which see the prompts as tokens
    leave     hook: cut the prompts out
              hooks of others

Prompts that pass through several blocks are kept with the output of one block until the next one is entered.
Shapes: B batch, N tokens, D width, P prompts.
"""

from __future__ import annotations

import functools
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from petune.base.errors import AttachError
from petune.injector.hooks.around import Around
from petune.injector.hooks.base import (
    SKIPPED,
    Args,
    Holder,
    Kwargs,
    first_tensor,
    live_forward,
    phase_of,
    with_first_tensor,
    with_tensor,
)
from petune.injector.hooks.position_bias import Padding, pad_argument
from petune.injector.hooks.prompt_slot import PromptSlot
from petune.injector.hooks.side import SideStep
from petune.sites.site import Site

CARRIED = "petune_prompts"
"""Attribute of a block's output: its number and the prompts that leave it, which a repetition finds there."""


class Prompts(Holder):
    """Inserts tokens behind the prefix where the first of its blocks is entered, and cuts them out after the last.

    Attributes:
        slot: Where the prompts are among the tokens.
        padding: How further arguments of a block are padded; see `position_bias.paddings`.
        entered: The modules that the prompts enter.
    """

    def __init__(self, adapter: nn.Module, slot: PromptSlot, padding: Mapping[int | str, Padding]) -> None:
        self.entered: list[PromptedModule] = []
        super().__init__(adapter)
        self.slot = slot
        self.padding = padding
        self.clear()

    @property
    def enabled(self) -> bool:
        """True while the modules that the prompts enter have a forward with prompts."""
        return bool(self.__dict__.get("_enabled", False))

    @enabled.setter
    def enabled(self, on: bool) -> None:
        if on != self.enabled:
            self.__dict__["_enabled"] = on
            for module in self.entered:
                module.switch(on)

    def clear(self) -> None:
        super().clear()
        self.hidden: tuple[Tensor, Tensor] | None = None  # a block's input without and with prompts
        self.carried: tuple[int, Tensor] | None = None  # the block that prompts have left last, and these prompts

    def snapshot(self) -> tuple[int, Tensor] | None:
        return self.carried

    def restore(self, snapshot: tuple[int, Tensor] | None) -> None:
        self.carried = snapshot

    def find_again(self, x: Tensor) -> None:
        self.carried = getattr(x, CARRIED, self.carried)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "hidden": None, "carried": None}

    @property
    def num_prompts(self) -> int:
        """P."""
        return self.slot.num_prompts

    def prompts_for(self, x_BND: Tensor, index: int) -> Tensor:
        """Return the (1 or B, P, D) prompts that enter a block with these tokens.

        Args:
            x_BND: The block's input.
            index: The block's position among those that the prompts pass through.
        """
        if index == 0:
            return self.run(x_BND)
        sources = [source for source in (getattr(x_BND, CARRIED, None), self.carried) if source is not None]
        kept = next((prompts for last, prompts in sources if last == index - 1), None)
        if kept is None:
            raise AttachError(
                "prompts that pass through several blocks were lost between two of them: a block was entered out of "
                "order, or is recomputed from a copy of its input. Use prompts in each block (vpt:deep=true), or "
                "gradient checkpointing with use_reentrant=False"
            )
        return kept

    def with_prompts(self, x_BND: Tensor, prompts: Tensor) -> Tensor:
        """Return (B, N + P, D)."""
        if prompts.shape[-2] != self.num_prompts:
            raise AttachError(
                f"the prompt adapter returned {prompts.shape[-2]} tokens, but its num_prompts is {self.num_prompts}. "
                "Both must be the same"
            )
        if x_BND.ndim > prompts.ndim:  # windows have a dimension of their own (NesT)
            prompts = prompts.unsqueeze(1)
        prompts_BPD = prompts.to(x_BND.dtype).expand(*x_BND.shape[:-2], -1, -1)
        index = self.slot.index
        before, after = torch.split(x_BND, [index, x_BND.shape[-2] - index], dim=-2)
        return torch.cat([before, prompts_BPD, after], dim=-2)

    def without_prompts(self, x_BND: Tensor) -> Tensor:
        """Take the prompts out: (B, N + P, D) to (B, N, D)."""
        start, count = self.slot.index, self.num_prompts
        # split's gradient is one copy; that of two slices would be two zeroed tensors and their sum
        before, _, after = torch.split(x_BND, [start, count, x_BND.shape[-2] - start - count], dim=-2)
        return torch.cat([before, after], dim=-2)

    def only_prompts(self, x_BND: Tensor) -> Tensor:
        """Keep the prompts alone: (B, N + P, D) to (B, P, D)."""
        return x_BND.narrow(-2, self.slot.index, self.num_prompts)

    def padded(self, args: Args, kwargs: Kwargs, num_tokens: int) -> tuple[Args, Kwargs]:
        """Return the arguments with rows for the prompts in all but the first.

        Args:
            args: Of the block.
            kwargs: Of the block.
            num_tokens: N of this call; a model may take images of several sizes.
        """
        slot = replace(self.slot, num_tokens=num_tokens)
        default = Padding()
        further = (pad_argument(a, slot, self.padding.get(i, default)) for i, a in enumerate(args) if i)
        padded = {name: pad_argument(value, slot, self.padding.get(name, default)) for name, value in kwargs.items()}
        return (*args[:1], *further), padded


class AttentionPrompts(Prompts):
    """Inserts the same tokens into every window of every image where an attention is entered, cuts them out after it.

    Images of a batch do not mix: each window gets its own copy of the prompts, and their outputs are dropped. This
    equals prompts that a block has for itself, because those affect the block's other tokens in its attention only.
    """

    def __init__(
        self, adapter: nn.Module, slot: PromptSlot, padding: Mapping[int | str, Padding], norm: Site | None
    ) -> None:
        super().__init__(adapter, slot, padding)
        # a tuple hides the block's own norm from the holder's submodules
        self.norm = None if norm is None else (norm.enter, norm.layout)

    def prompts_for(self, x_BND: Tensor, index: int) -> Tensor:
        """Return the prompts, normalized if the attention's block does that first."""
        return self._normalized(super().prompts_for(x_BND, index).to(x_BND.dtype))

    def _normalized(self, prompts_BPD: Tensor) -> Tensor:
        if self.norm is None:
            return prompts_BPD
        norm, layout = self.norm
        if layout == "BCHW":
            image_BDP1 = prompts_BPD.movedim(-1, 1).unsqueeze(-1)  # an image of P rows and one column
            normalized: Tensor = norm(image_BDP1).squeeze(-1).movedim(1, -1)
        else:
            normalized = norm(prompts_BPD)
        return normalized


class PromptedModule:
    """The hooks of one module that prompts enter, and its forward with them.

    Args:
        holder: The prompts.
        module: A block or an attention; bound methods of this object follow a deep copy of it.
        index: Its position among the modules that the prompts pass through.
        last: True if the prompts end here.
    """

    def __init__(self, holder: Prompts, module: nn.Module, index: int, *, last: bool) -> None:
        self.holder = holder
        self.module = module
        self.index = index
        self.last = last
        self.original: Callable[..., Any] | None = None
        self.is_wrapped = False

    @property
    def is_idle(self) -> bool:
        """True if its forward only passes on."""
        return not self.holder.enabled

    def switch(self, on: bool) -> None:
        """Replace the module's forward, or restore it.

        A forward that someone else has put there since stays: it calls this one, which then only passes on.
        """
        current = self.module.__dict__.get("forward")
        if on:
            if current is None or not self.is_wrapped:
                self.original = current
                self.module.forward = self.forward
            return
        self.is_wrapped = current != self.forward
        if self.is_wrapped:
            return
        original = live_forward(self.original)
        if original is not None:
            self.module.forward = original
        else:
            del self.module.forward

    def enter(self, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        """Insert the prompts; pre-hook."""
        holder = self.holder
        if not holder.acts_at(module):
            return None
        x_BND = first_tensor(args, kwargs)
        if x_BND.is_nested:
            raise AttachError(
                "prompts cannot enter a nested tensor, whose images have different numbers of tokens. Use images of "
                "one size, or a method without prompts, such as adaptformer"
            )
        prompted = holder.with_prompts(x_BND, holder.prompts_for(x_BND, self.index))
        holder.hidden = x_BND, prompted
        return with_first_tensor(args, kwargs, prompted)

    def conceal(self, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        """Cut the prompts out until the forward; pre-hook."""
        holder = self.holder
        if not holder.acts_at(module):
            return None
        if holder.hidden is None:
            raise AttachError(
                f"an adapter that acts where {type(module).__name__} is entered calls that module, which has prompts. "
                "Call another module there, or disable the prompts"
            )
        prompted = first_tensor(args, kwargs)
        if prompted is not holder.hidden[1]:  # an adapter has changed it
            holder.hidden = holder.without_prompts(prompted), prompted
        return with_first_tensor(args, kwargs, holder.hidden[0])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module's own forward with the prompts."""
        original = self.original or functools.partial(type(self.module).forward, self.module)
        if not self.holder.acts_at(self.module):
            return original(*args, **kwargs)
        hidden, self.holder.hidden = self.holder.hidden, None
        if hidden is None:
            return original(*args, **kwargs)
        x_BND = first_tensor(args, kwargs)
        own, prompted = hidden
        if x_BND is not own:  # a hook of someone else has changed it
            prompted = self.holder.with_prompts(x_BND, self.holder.only_prompts(prompted))
        args, kwargs = with_first_tensor(args, kwargs, prompted)
        args, kwargs = self.holder.padded(args, kwargs, x_BND.shape[-2])
        return original(*args, **kwargs)

    def leave(self, module: nn.Module, args: Args, output: Any) -> Any:
        """Cut the prompts out; hook. Between two blocks they are kept with the output."""
        if self.holder.carried is not None and phase_of(module) == SKIPPED and self.holder.enabled:
            return with_tensor(output, self._carry)  # what an adapter around the block has returned
        return with_tensor(output, self._cut) if self.holder.acts_at(module) else None

    def _cut(self, x_BND: Tensor) -> Tensor:
        holder = self.holder
        tokens = holder.without_prompts(x_BND)
        if self.last:
            holder.carried = None
            return tokens
        prompts = holder.only_prompts(x_BND)
        holder.carried = self.index, prompts
        return self._carry(tokens)

    def _carry(self, tokens: Tensor) -> Tensor:
        """Let the tokens that leave the block carry the prompts that left it last."""
        if tokens.requires_grad and not torch.compiler.is_compiling():
            setattr(tokens, CARRIED, self.holder.carried)
        return tokens


def is_adapter_hook(hook: Callable[..., Any]) -> bool:
    """Return True for the hooks by which adapters act, and prompts enter and leave."""
    return isinstance(getattr(hook, "__self__", None), Holder | PromptedModule | SideStep)


def order_hooks(hooks: OrderedDict[int, Callable[..., Any]], newest: int) -> None:
    """Order a module's hooks after petune has added one: adapters act in the order in which they were declared.

    Petune's adapters see prompts as tokens, and hooks of others never see them.

    Args:
        hooks: Forward hooks or forward pre-hooks of one module, by id; ids grow with time.
        newest: Id of the hook that was added. If it is the first one, other adapters' hooks go before it.
    """

    def rank(hook: Callable[..., Any]) -> int:
        outer = getattr(hook, "__func__", None) in (PromptedModule.conceal, PromptedModule.leave)
        return 1 if outer else 0 if is_adapter_hook(hook) else 2

    if next(iter(hooks)) == newest and isinstance(getattr(hooks[newest], "__self__", None), Holder | SideStep):
        earlier = [key for key, hook in hooks.items() if key != newest and rank(hook) == 0]
        for key in reversed(earlier):
            hooks.move_to_end(key, last=False)
    ranks = {key: rank(hook) for key, hook in hooks.items()}
    if 1 in ranks.values():
        for key in sorted(ranks, key=lambda key: ranks[key]):
            hooks.move_to_end(key)
    for key in sorted(hooks, key=lambda key: _nesting(hooks[key])):
        hooks.move_to_end(key)


def _nesting(hook: Callable[..., Any]) -> int:
    """Return a number that is negative for hooks that come first, and positive for those that come last.

    A tensor between modules is read and replaced before the next module is entered. An adapter that surrounds a module
    surrounds all others there; of two of them, the later one is the outer one.
    """
    owner, name = getattr(hook, "__self__", None), getattr(hook, "__name__", "")
    if isinstance(owner, Around):
        return owner.depth if name == "leave" else -owner.depth
    return -sys.maxsize if getattr(owner, "between", False) and name.startswith("enter") else 0
