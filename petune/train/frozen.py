"""Frozen weights in bfloat16 while training in bfloat16: autocast would make the same copy anew at every forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

CASTING = (F.linear, torch.conv2d, F.conv2d)
"""Autocast casts all that these compute with, so that a weight that is cast already gives the same bits."""
HARMLESS = {"shape", "ndim", "device", "requires_grad", "is_cuda", "grad_fn", "data_ptr"}
"""What may be asked of a weight: it does not depend on the number format."""


@contextmanager
def frozen_in_bfloat16(model: nn.Module, forward: Callable[[], Tensor]) -> Iterator[int]:
    """Inside, frozen weights that are only multiplied with are stored in bfloat16; afterwards they are as they were.

    Args:
        model: Its parameters keep their identity.
        forward: Scores of some pictures under autocast, always the same ones. It shows how each weight is used: one
            that is read otherwise, as DoRA does, stays in float32, and so do all if the scores should differ.

    Yields:
        How many bytes the copies take.
    """
    with _Uses() as uses:
        expected = forward()
    chosen = [p for p in _frozen(model) if id(p) in uses.cast and id(p) not in uses.read]
    originals = [(p, p.data.cpu(), p.device) for p in chosen]  # a GPU's memory is not for what is not computed with
    try:
        for p in chosen:
            p.data = p.data.to(torch.bfloat16)
        if chosen and not _equal(forward, expected):
            _put_back(originals)
            chosen = []
        yield sum(2 * p.numel() for p in chosen)
    finally:
        _put_back(originals)


class _Uses(TorchFunctionMode):
    """Which tensors are arguments of casting operations, and which of others, by identity."""

    def __init__(self) -> None:
        super().__init__()
        self.cast, self.read = set[int](), set[int]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(getattr(func, "__self__", func), "__name__", "")
        if func in CASTING:
            weights = [*args[1:3], *((kwargs or {}).get(key) for key in ("weight", "bias"))]
            self.cast.update(id(t) for t in weights)
        elif name not in HARMLESS:
            self.read.update(id(t) for t in tree_flatten((args, kwargs))[0] if isinstance(t, nn.Parameter))
        return func(*args, **(kwargs or {}))


def _frozen(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if not p.requires_grad and p.dtype == torch.float32]


def _put_back(originals: Sequence[tuple[nn.Parameter, Tensor, torch.device]]) -> None:
    for p, data, device in originals:
        p.data = data.to(device)


def _equal(forward: Callable[[], Tensor], expected: Tensor) -> bool:
    try:
        return torch.equal(forward(), expected)
    except RuntimeError:  # two dtypes met outside of autocast
        return False
