"""A holder that replaces the residual stream between two modules.

No module returns that tensor: the block's own code adds to it, and passes it to the norm before the MLP. The holder
writes the adapter's output into the tensor itself where the next module is entered. So everything that reads the stream
from there on sees the new values, whatever the block computes with it: a scaled residual sum, a norm of the sum, or no
sum. The adapter gets a copy, so that autograd still has the old values.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from petune.injector.hooks.base import (
    CALLED,
    Args,
    Holder,
    Kwargs,
    first_tensor,
    phase_of,
    shaped_like,
    to_channels_last,
)
from petune.injector.hooks.reading import Reader
from petune.sites.site import Layout


class Stream(Holder):
    """Writes `adapter(stream)` into the stream where the module behind it is entered."""

    between = True

    def __init__(self, adapter: nn.Module, layout: Layout) -> None:
        super().__init__(adapter)
        self.layout = layout

    def enter(self, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        """Replace the values of the input; pre-hook of the module that the stream enters."""
        if not self.acts_at(module) or phase_of(module) != CALLED:
            return
        x = first_tensor(args, kwargs)
        y = self.run(to_channels_last(x.clone(), self.layout))
        x.copy_(shaped_like(y, x, self.layout, self.adapter))


def let_readers_keep_copies(module: nn.Module) -> None:
    """Let the adapters that read a stream before it is replaced keep what they read."""
    for hook in module._forward_pre_hooks.values():
        owner: Any = getattr(hook, "__self__", None)
        if isinstance(owner, Reader):
            owner.keeps_copy = True
