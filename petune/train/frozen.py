"""Frozen weights in bfloat16 while training in bfloat16: autocast would make the same copy anew at every forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

CAST = (nn.Linear, nn.Conv2d)
"""Autocast casts all that these compute with, so that a weight that is cast already gives the same bits."""


@contextmanager
def frozen_in_bfloat16(model: nn.Module, forward: Callable[[], Tensor]) -> Iterator[int]:
    """Inside, the frozen weights of linear layers and convolutions are stored in bfloat16; afterwards as they were.

    Args:
        model: Its parameters keep their identity.
        forward: Scores of some pictures under autocast; they must be equal to the bit, or nothing is changed (a method
            may read a weight otherwise than by the layer's call, as DoRA does).

    Yields:
        How many bytes the copies take.
    """
    chosen = _frozen_parameters(model)
    expected = forward() if chosen else torch.empty(0)
    originals = [(p, p.data.cpu(), p.device) for p in chosen]  # a GPU's memory is not for what is not computed with
    try:
        for p in chosen:
            p.data = p.data.to(torch.bfloat16)
        if not _equal(forward, expected):
            _put_back(originals)
            chosen = []
        yield sum(2 * p.numel() for p in chosen)
    finally:
        _put_back(originals)


def _put_back(originals: Sequence[tuple[nn.Parameter, Tensor, torch.device]]) -> None:
    for p, data, device in originals:
        p.data = data.to(device)


def _equal(forward: Callable[[], Tensor], expected: Tensor) -> bool:
    try:
        return not len(expected) or torch.equal(forward(), expected)
    except RuntimeError:  # two dtypes met outside of autocast
        return False


def _frozen_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All of layers that are frozen as a whole, each once, unless another module that trains holds it too."""
    found: dict[int, nn.Parameter] = {}
    kept: set[int] = set()
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False)).values()
        plain = isinstance(module, CAST) and not parametrize.is_parametrized(module)
        if plain and not any(p.requires_grad for p in own):
            found |= {id(p): p for p in own if p.dtype == torch.float32}
        else:
            kept |= {id(p) for p in own}
    return [p for key, p in found.items() if key not in kept]
