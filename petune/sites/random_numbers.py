"""See whether a forward draws random numbers, also one that only has shapes."""

from __future__ import annotations

import contextlib
import pickle
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from petune.sites.random_draws import draws_random_numbers

LARGE = 200_000_000
"""Parameters of a model whose forward takes over a second on a CPU: shapes alone are computed if that suffices."""


def is_large(model: nn.Module) -> bool:
    """Return whether a forward of a model takes so long that it is to be avoided."""
    return sum(p.numel() for p in model.parameters()) >= LARGE and not any(p.is_meta for p in model.parameters())


def random_state(device: torch.device) -> tuple[object, ...]:
    """Return the states of all generators that a forward on a device may use."""
    numpy = sys.modules.get("numpy")
    numpy_state = pickle.dumps(numpy.random.get_state()) if numpy is not None else b""
    cuda_state = torch.cuda.get_rng_state(device).numpy().tobytes() if device.type == "cuda" else b""
    return torch.get_rng_state().numpy().tobytes(), cuda_state, random.getstate(), numpy_state


@contextlib.contextmanager
def watch_draws() -> Iterator[Draws]:
    """Yield what notices random numbers that are drawn inside the context."""
    before = random_state(torch.device("cpu"))
    with Draws() as draws:
        yield draws
    draws.any |= random_state(torch.device("cpu")) != before


class Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notices operations that draw random numbers, on any device.

    Attributes:
        any: True if one did.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.any = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.any |= draws_random_numbers(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))
