"""A holder that surrounds modules: its adapter runs them as often as it likes, or not at all.

A pre-hook of the first module runs the adapter. For each of its calls of `inner`, the modules run one after another
with all other adapters there. Then the model's own calls of the modules only pass on what the adapter has returned,
and the other adapters there do nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from petune.base.errors import AttachError
from petune.injector.hooks.base import (
    CALLED,
    INNER,
    PHASE,
    SKIPPED,
    Args,
    Holder,
    Kwargs,
    first_tensor,
    in_backward,
    in_dtype_of,
    live_forward,
    phase_of,
    shaped_like,
    tensor_of,
    to_channels_last,
    with_first_tensor,
)
from petune.injector.hooks.spanning import ADVICE
from petune.sites.site import Layout


class Link(NamedTuple):
    """One of the modules that run one after another.

    Attributes:
        module: The module.
        takes_further: True if it takes the same further arguments as the first one.
    """

    module: nn.Module
    takes_further: bool


class Around(Holder):
    """Replaces what modules compute, one after another, by `adapter(inner, x)`.

    Args:
        adapter: Maps a function and the input of the first module to the output of the last one.
        links: The modules; a tuple hides them from the holder's submodules.
        enter_layout: Of what enters the first one.
        exit_layout: Of what leaves the last one.
        others: All holders on the model, a list that grows. Each call of `inner` finds what they kept before the first.
        depth: 1 for the innermost adapter around the first module, then 2, and so on.
    """

    def __init__(
        self,
        adapter: nn.Module,
        links: tuple[Link, ...],
        enter_layout: Layout,
        exit_layout: Layout,
        others: list[Holder],
        *,
        depth: int,
    ) -> None:
        super().__init__(adapter)
        self.others = others
        self.links = links
        self.enter_layout = enter_layout
        self.exit_layout = exit_layout
        self.depth = depth
        self.skipped: tuple[tuple[nn.Module, int], ...] = ()
        """The modules that pass on now, each with the phase that it goes back to."""

    def enter(self, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        """Run the adapter, and let the modules pass on what it returns; outermost pre-hook of the first module."""
        self.finish()  # what a forward has left that an exception ended between two of the modules
        if not self.acts_at(module):
            return None
        x = first_tensor(args, kwargs)
        adapted = in_dtype_of(self.adapter, to_channels_last(x, self.enter_layout))
        if in_backward():
            for other in self.others:
                other.find_again(x)
        kept = [(other, other.snapshot()) for other in self.others]
        y = self.checked(self.call(functools.partial(self.inner, args, kwargs, kept), adapted))
        self.skipped = tuple((link.module, phase_of(link.module)) for link in self.links)
        for m, _ in self.skipped:
            setattr(m, PHASE, SKIPPED)
        if in_backward():  # gradient checkpointing may repeat a block without the others
            Variable._execution_engine.queue_callback(self.finish)
        return with_first_tensor(args, kwargs, self._like_output(y, x))

    def _like_output(self, y: Tensor, x: Tensor) -> Tensor:
        if self.enter_layout == self.exit_layout and y.shape[-1] == x.shape[1 if self.enter_layout == "BCHW" else -1]:
            return shaped_like(y, x, self.exit_layout, self.adapter)
        return y.movedim(-1, 1) if self.exit_layout == "BCHW" else y  # other than what enters

    def inner(self, args: Args, kwargs: Kwargs, kept: list[tuple[Holder, Any]], x: Tensor) -> Tensor:
        """Return what the modules make of (..., D), with the further arguments that the first one was called with."""
        for other, snapshot in kept:
            other.restore(snapshot)
        entered = first_tensor(args, kwargs)
        dtype = x.dtype
        if dtype != entered.dtype and not torch.is_autocast_enabled(x.device.type):
            x = x.to(entered.dtype)
        y = x.movedim(-1, 1) if self.enter_layout == "BCHW" else x
        with self._inside():
            for module, takes_further in self.links:
                if takes_further:
                    args, kwargs = with_first_tensor(args, kwargs, y)
                    y = tensor_of(module(*args, **kwargs))
                else:
                    y = tensor_of(module(y))
        y = to_channels_last(y, self.exit_layout)
        return y if y.dtype == dtype or torch.is_autocast_enabled(y.device.type) else y.to(dtype)

    @contextmanager
    def _inside(self) -> Iterator[None]:
        before = [(link.module, phase_of(link.module)) for link in self.links]
        try:
            for module, _ in before:
                setattr(module, PHASE, INNER)
            yield
        finally:
            for module, phase in before:
                setattr(module, PHASE, phase)

    def refuse_alone(self, module: nn.Module, args: Args) -> None:
        """Check that a repetition in the backward pass has begun with the first module; pre-hook of the others.

        Raises:
            AttachError: It has not, so this module would compute again what the adapter has computed.
        """
        if in_backward() and not self.skipped and self.acts_at(module) and phase_of(module) == CALLED:
            raise AttachError(
                f"an adapter is around {type(module).__name__} and modules before it, which gradient checkpointing "
                f"does not repeat together with it. {ADVICE}"
            )

    def leave(self, module: nn.Module, args: Args, output: Any) -> None:
        """Let the modules compute again; outermost hook of each module, also after an exception."""
        if self.skipped and module is self.skipped[-1][0]:
            self.finish()

    def finish(self) -> None:
        """Let the modules compute again."""
        for module, phase in self.skipped:
            setattr(module, PHASE, phase)
        self.skipped = ()

    def clear(self) -> None:
        super().clear()
        self.finish()


def num_around(module: nn.Module) -> int:
    """Return the number of adapters around a module."""
    return sum(isinstance(getattr(hook, "__self__", None), Around) for hook in module._forward_pre_hooks.values())


class PassOn:
    """The forward of a module that adapters may surround. It is put on the module once, for all of them.

    Attributes:
        module: The module; bound methods of this object follow a deep copy of it.
        original: The module's own forward, if it has one that is not its class's.
        users: Number of adapters around the module.
        num_items: Number of items that the module returns, if that is a tuple.
    """

    def __init__(self, module: nn.Module, num_items: int | None) -> None:
        self.module = module
        self.original: Callable[..., Any] | None = module.__dict__.get("forward")
        self.users = 0
        self.num_items = num_items

    @property
    def is_idle(self) -> bool:
        """True if it does nothing any more, but something else has wrapped it."""
        return self.users == 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute, or pass on the first argument."""
        if phase_of(self.module) == SKIPPED:
            x = first_tensor(args, kwargs)
            return x if self.num_items is None else (x, *[None] * (self.num_items - 1))
        original = self.original or functools.partial(type(self.module).forward, self.module)
        return original(*args, **kwargs)

    def remove(self) -> None:
        """Take it off the module when the last adapter goes."""
        self.users -= 1
        current = self.module.__dict__.get("forward")
        if self.users or getattr(current, "__self__", None) is not self:
            return
        original = live_forward(self.original)
        if original is None:
            del self.module.forward
        else:
            self.module.forward = original
        self.module.__dict__.pop(PHASE, None)


def pass_on(module: nn.Module, num_items: int | None) -> Callable[[], None]:
    """Let a module pass on its input while it is told to; return what undoes that."""
    current = getattr(module.__dict__.get("forward"), "__self__", None)
    forward = current if isinstance(current, PassOn) else PassOn(module, num_items)
    if forward is not current:
        module.forward = forward.forward
    forward.users += 1
    setattr(module, PHASE, CALLED)
    return forward.remove
