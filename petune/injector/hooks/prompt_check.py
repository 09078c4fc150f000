"""Where prompts go in each block, and the proof that they falsify nothing there, from one forward seen beforehand."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from petune.injector.hooks.hidden_prompts import HiddenPrompts, same
from petune.injector.hooks.position_bias import Room, is_inside, refused
from petune.sites.forward import dtype_of, inference, tensors_in
from petune.sites.site import Block, Sites


@dataclass
class Seen:
    """One call of a block: what it was given and what it returned, and how many tokens its attention saw.

    Attributes:
        attended: What its attention returned.
        mid: What entered its `mid`.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tokens: int
    output: Any = None
    attended: Tensor | None = None
    mid: Tensor | None = None

    @property
    def stream(self) -> Tensor | None:
        """The tokens that it was given."""
        return next(tensors_in((self.args, self.kwargs)), None)

    @property
    def left(self) -> Tensor:
        """The tokens that it returned."""
        return next(tensors_in(self.output))


class Prompting:
    """What `Edit.prompt` needs to know of the model as it is without the prompts.

    Args:
        model: As it is; nothing is run before it is asked.
        sites: Its sites.
    """

    def __init__(self, model: nn.Module, sites: Sites) -> None:
        self.model, self.sites = model, sites
        self._seen: dict[int, Seen] = {}
        self._plain: Tensor | None = None
        self._rooms: list[Room] = []

    def room(self, block: Block, count: int) -> Room:
        """Room for `count` prompts: behind the prefix tokens, or first of all in the attention alone."""
        if not self._seen:
            self._plain = self._look()
        index = 0 if is_inside(block) else self.sites.num_prefix_tokens
        return Room(index, count, self._seen[id(block.enter)].tokens)

    def seen(self, block: Block) -> Seen:
        """The block's call in the forward without prompts."""
        return self._seen[id(block.enter)]

    def prove(self, run: tuple[Block, ...], room: Room) -> None:
        """Compare the blocks with hidden prompts to what they were without; see `same` for the meta device.

        Raises:
            AttachError: They differ, or do not run.
        """
        seen, block = self._seen[id(run[0].enter)], run[0]
        alone = len(run) == 1 and block.is_module
        if room not in self._rooms:
            self._rooms.append(room)  # earlier blocks' prompts are in the model already: hide them too
        try:
            with inference(self.model), contextlib.ExitStack() as stack:
                modes = [stack.enter_context(HiddenPrompts(r)) for r in self._rooms]
                output = block.enter(*seen.args, **seen.kwargs) if alone else self.model(self._image())
        except Exception as error:
            raise refused(block, self.sites, f"does not run with them ({type(error).__name__}: {error})") from error
        before = seen.output if alone else self._plain
        if not modes[self._rooms.index(room)].count:
            why = "does not weigh its tokens one against another where they come in (but channels, or tokens elsewhere)"
            raise refused(block, self.sites, why)
        if not same(next(tensors_in(before)), next(tensors_in(output))):
            why = "knows the places of its tokens in a way that petune cannot tell about tokens without a place"
            raise refused(block, self.sites, why)
        if run[-1] is self.sites.blocks[-1]:
            self._seen = {}  # activations are not kept longer than needed

    def _look(self) -> Any:
        handles = [h for block in self.sites.blocks for h in self._watch(block)]
        try:
            with inference(self.model):
                return self.model(self._image())
        finally:
            for handle in handles:
                handle.remove()

    def _watch(self, block: Block) -> list[Any]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            tokens = next(tensors_in((args, kwargs))).shape[-2]
            self._seen[id(module)] = Seen(args, kwargs, tokens)

        def attend(module: nn.Module, args: Any, kwargs: Any) -> None:
            if is_inside(block):
                self._seen[id(block.enter)].tokens = next(tensors_in((args, kwargs))).shape[-2]

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._seen[id(block.enter)].output = output

        def attended(module: nn.Module, args: Any, output: Any) -> None:
            self._seen[id(block.enter)].attended = next(tensors_in(output), None)

        def mid(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._seen[id(block.enter)].mid = next(tensors_in((args, kwargs)), None)

        inner = block.parts.get("attn", block).enter
        more = []
        if is_inside(block):
            more = [inner.register_forward_hook(attended)]
            more += [block.mid.enter.register_forward_pre_hook(mid, with_kwargs=True)] if "mid" in block.parts else []
        return [
            block.enter.register_forward_pre_hook(enter, with_kwargs=True),
            inner.register_forward_pre_hook(attend, with_kwargs=True),
            block.exit.register_forward_hook(leave),
            *more,
        ]

    def _image(self) -> Tensor:
        x = torch.randn(1, *self.sites.input_size, generator=torch.Generator().manual_seed(0), device="cpu")
        return x.to(next(self.model.parameters()).device, dtype_of(self.model))
