"""Attentions that read the weight of their qkv layer but can call the layer instead (timm: EVA, BEiT, Swin-V2).

An adapter at a layer takes effect only where the layer is called. timm's `qkv_bias_separate` makes these attentions
call it; the result is the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def qkv_readers(module: nn.Module) -> list[Any]:
    """Return the attentions inside `module` that can either call their qkv layer or read its weight."""
    return [m for m in module.modules() if hasattr(m, "qkv_bias_separate") and hasattr(m, "qkv")]


@contextmanager
def qkv_called(model: nn.Module) -> Iterator[None]:
    """Let every attention call its qkv layer inside the context."""
    attentions = [m for m in qkv_readers(model) if m.qkv_bias_separate is False]
    for attention in attentions:
        attention.qkv_bias_separate = True
    try:
        yield
    finally:
        for attention in attentions:
            attention.qkv_bias_separate = False
