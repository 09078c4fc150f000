"""Put a forward on a module in place of its own, and take it off again in any order."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from petune.injector.hooks.base import live_forward

Run = Callable[[Callable[..., Any], Any, Any], Any]


class ReplacedForward:
    """A forward on a module that calls `run(original, args, kwargs)`.

    Args:
        is_outermost: Stay around those that are put on the module later.

    Attributes:
        module: The module; bound methods of this object follow a deep copy of it.
        run: A bound method, with the forward that was there before as its first argument.
        original: The forward that was on the module, if it had one that is not its class's.
        is_idle: True after `remove`, if another forward is around this one.
    """

    def __init__(self, module: nn.Module, run: Run, *, is_outermost: bool = False) -> None:
        self.module = module
        self.run = run
        self.original: Callable[..., Any] | None = module.__dict__.get("forward")
        self.is_idle = False
        self.is_outermost = is_outermost
        outer = getattr(self.original, "__self__", None)
        if isinstance(outer, ReplacedForward) and outer.is_outermost:
            self.original, outer.original = outer.original, self.forward
        else:
            module.forward = self.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run in place of the module's own forward."""
        original = self.original or functools.partial(type(self.module).forward, self.module)
        return original(*args, **kwargs) if self.is_idle else self.run(original, args, kwargs)

    def remove(self) -> None:
        """Restore the forward, unless someone else has put another one around it: this one then only passes on."""
        self.is_idle = True
        module = self.module
        if module.__dict__.get("forward") != self.forward:
            return
        del module.forward
        original = live_forward(self.original)
        if original is not None:
            module.forward = original
