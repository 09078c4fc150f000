"""Run linear layers with frozen bfloat16 weights by oneDNN's own kernel: the same bits as torch's, in less CPU time.

torch first copies the bias to every row of the output and reorders the weight at every call. docs/decisions.md has
what this saves.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from petune.sites.hooked import removed_after
from petune.training.speed.verify import same_logits

FEW_ROWS = 4096
"""Below this, reordering the weight is a large part of a call, so a reordered copy is kept."""
SMALL_WEIGHT = 2**19
"""A copy of a weight with fewer elements is kept anyway: it is small beside the activations."""
SHARE_OF_MEMORY = 1 / 16
"""At most this part of the machine's memory goes to reordered copies."""


@contextmanager
def use_onednn_linear(model: nn.Module, sample_logits: Callable[[], Tensor], scale: float) -> Iterator[int]:
    """Use oneDNN's kernel for linear layers with frozen bfloat16 weights inside the context, if it gives the same bits.

    Args:
        model: See `store_in_bf16`, which converts the weights.
        sample_logits: Returns the logits of a few images under autocast, always the same ones.
        scale: How many times as many images training sends through the model at once.

    Yields:
        The number of such layers. It is 0 where torch has no oneDNN or the kernel rounds in another way.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and _is_eligible(m)] if has_kernel() else []
    try:
        if layers:
            rows, expected = _count_rows(layers, sample_logits)
            _replace({layer: int(count * scale) for layer, count in rows.items()})
            if not same_logits(expected, sample_logits):
                _put_back(layers)
        yield sum(type(layer) is OnednnLinear for layer in layers)
    finally:
        _put_back(layers)


class Weights:
    """A layer's weight as the kernel wants it, in both directions.

    Args:
        weight: (out, in), bfloat16.
        rows: Rows of the input in training.
        reorder: Keep reordered copies. That for the backward pass is made when the first gradient comes.
    """

    def __init__(self, weight: Tensor, rows: int, reorder: bool) -> None:
        self.weight = weight
        self.rows = rows
        self.reorder = reorder
        self.version = weight._version
        self.for_input = _reordered(weight, rows) if reorder else weight
        self.for_gradient: Tensor | None = None

    def belong_to(self, layer: nn.Linear) -> bool:
        """Return True if the layer still has the weight that this was made from."""
        return layer.weight.data_ptr() == self.weight.data_ptr() and layer.weight._version == self.version

    def backward(self, grad: Tensor) -> Tensor:
        """Return the gradient of the layer's input."""
        if not self.reorder:
            return grad @ self.weight
        if self.for_gradient is None:
            self.for_gradient = _reordered(self.weight.t().contiguous(), self.rows)
        return linear(grad, self.for_gradient, None)

    def give_same_bits(self, bias: Tensor | None) -> bool:
        """Return True if forward and backward of a small input equal torch's; False if there is no such kernel."""
        outputs, inputs = self.weight.shape
        x = torch.linspace(-1, 1, 2 * inputs).view(2, inputs).bfloat16()
        grad = torch.linspace(-1, 1, 2 * outputs).view(2, outputs).bfloat16()
        try:
            same = torch.equal(linear(x, self.for_input, bias), F.linear(x, self.weight, bias))
            same = same and torch.equal(self.backward(grad), grad @ self.weight)
        except RuntimeError:
            return False
        self.for_gradient = None  # below the lowest adapter it is never needed
        return same


_WEIGHTS: weakref.WeakKeyDictionary[nn.Linear, Weights] = weakref.WeakKeyDictionary()


class OnednnLinear(nn.Linear):
    """The class of a replaced layer. A copy of it, or a layer with new weights, computes as nn.Linear does."""

    def forward(self, input: Tensor) -> Tensor:
        weights = _WEIGHTS.get(self)
        usable = weights is not None and torch.is_autocast_enabled("cpu") and weights.belong_to(self)
        if not usable or not input.is_contiguous():  # torch rounds before it adds the bias to a sliced input
            return super().forward(input)
        output: Tensor = _LinearFunction.apply(input.to(torch.bfloat16), weights, self.bias)
        return output


class _LinearFunction(torch.autograd.Function):
    """x W^T + b with a gradient for x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Weights, bias: Tensor | None) -> Tensor:
        ctx.weights = weights
        return linear(x, weights.for_input, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.weights.backward(grads[0]), None, None


def has_kernel() -> bool:
    """Return whether this PyTorch has oneDNN's kernel; the processor may still lack it."""
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _is_eligible(layer: nn.Linear) -> bool:
    """Return True for a plain, frozen bfloat16 layer with torch's own forward."""
    is_plain = type(layer) is nn.Linear and "forward" not in vars(layer)
    return is_plain and all(p.dtype == torch.bfloat16 and not p.requires_grad for p in layer.parameters())


def should_reorder(layer: nn.Linear, rows: int) -> bool:
    """Return whether a reordered copy of the layer's weight is worth its memory."""
    return rows < FEW_ROWS or layer.weight.numel() < SMALL_WEIGHT


def memory_for_copies() -> float:
    """Return how many bytes reordered copies may take: `SHARE_OF_MEMORY`; where that is unknown, of 16 GiB."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 2**34
    return memory * SHARE_OF_MEMORY


def _count_rows(layers: list[nn.Linear], forward: Callable[[], Tensor]) -> tuple[dict[nn.Linear, int], Tensor]:
    """Count the rows that enter each layer; return them with the logits."""
    rows: dict[nn.Linear, int] = {}

    def count(layer: Any, args: Any, output: Tensor) -> None:
        rows[layer] = output.numel() // layer.out_features

    handles = [layer.register_forward_hook(count) for layer in layers]
    with removed_after(handles):
        return rows, forward()


def _replace(rows: Mapping[nn.Linear, int]) -> None:
    room = memory_for_copies()
    for layer, count in rows.items():
        size = 2 * layer.weight.numel() * layer.weight.element_size()  # a copy for each direction
        reorder = should_reorder(layer, count) and size <= room
        weights = _weights_of(layer, count, reorder)
        if weights is not None:
            room -= size if reorder else 0
            _WEIGHTS[layer] = weights
            layer.__class__ = OnednnLinear


def _weights_of(layer: nn.Linear, rows: int, reorder: bool) -> Weights | None:
    try:
        weights = Weights(layer.weight.detach(), rows, reorder)
    except RuntimeError:  # the processor has no such kernel
        return None
    return weights if weights.give_same_bits(layer.bias) else None


def _put_back(layers: list[nn.Linear]) -> None:
    for layer in layers:
        if _WEIGHTS.pop(layer, None) is not None:
            layer.__class__ = nn.Linear


def _reordered(weight: Tensor, rows: int) -> Tensor:
    out: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x W^T + b by oneDNN's kernel."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out
