"""One forward without gradient that tells which modules are called, when, with what."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from petune.sites import Sites


@dataclass
class Call:
    """The first call of a module.

    Attributes:
        start, stop: Places in the order of all entries and exits that were watched.
        input: Its first argument.
        output: What it returned.
    """

    start: int
    stop: int = -1
    input: Any = None
    output: Any = None


def probe(model: nn.Module, sites: Sites, watched: Iterable[nn.Module]) -> dict[int, Call]:
    """Run the model on one black picture in eval mode.

    Args:
        model: Modes and random state are as before afterwards.
        sites: Of the model.
        watched: The modules to tell of.

    Returns:
        By identity of the module; one that was not called is missing.
    """
    calls: dict[int, Call] = {}
    clock = iter(range(10**9))

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        if id(module) not in calls:
            calls[id(module)] = Call(next(clock), input=next(iter((*args, *kwargs.values())), None))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        call = calls[id(module)]
        if call.stop < 0:
            call.stop, call.output = next(clock), output

    handles = [h for m in watched for h in _hooks(m, enter, leave)]
    modes = [(m, m.training) for m in model.modules()]
    like = next(p for p in model.parameters() if p.is_floating_point())
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad():
            model(torch.zeros(1, *sites.input_size, device=like.device, dtype=like.dtype))
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    return calls


def _hooks(module: nn.Module, enter: Any, leave: Any) -> tuple[Any, Any]:
    return (
        module.register_forward_pre_hook(enter, with_kwargs=True),
        module.register_forward_hook(leave, prepend=True),
    )
