"""Store the frozen weights of a backbone's linear layers in 8 or 4 bits, by libraries that do that.

A backend turns a weight into one that knows its values again; the layer computes with those, in the number format of
its input. Only the stored weight is kept for the backward pass, also without gradient checkpointing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from petune.backbones.own_forward import run_by_own_forward
from petune.base.errors import ConfigError, MissingExtra
from petune.base.malloc import keep_heap
from petune.sites.file_values import original_values
from petune.sites.new_weights import keep_flag
from petune.sites.sites import Sites

BasePrecision = Literal["auto", "int8", "nf4"]
SMALLEST = 2**14
"""Weights with fewer elements stay as they are: they take no memory, and their scales would."""
Backend = Callable[[Tensor], Tensor]
"""Returns a tensor of the shape of a weight, with a method `dequantize`."""


def check_base_precision(precision: BasePrecision) -> None:
    """Check that a number format is available, before any data and weights are read.

    Raises:
        MissingExtra: The backend's package is not installed.
    """
    if precision != "auto":
        BACKENDS[precision]()


def quantize_backbone(model: nn.Module, precision: BasePrecision, sites: Sites) -> int:
    """Quantize the weights of linear layers, but those of the head.

    A layer whose weight the model reads itself, as BEiT that of `qkv`, or that it never calls, stays as it is.

    Args:
        model: Changed in place.
        precision: `int8` or `nf4`; `auto` changes nothing.
        sites: The model's.

    Returns:
        The number of layers.

    Raises:
        MissingExtra: The backend's package is not installed.
        ConfigError: The model has no such layers.
    """
    if precision == "auto":
        return 0
    backend = BACKENDS[precision]()
    in_head = sites.head_modules()
    layers = [m for m in model.modules() if type(m) is nn.Linear and m not in in_head]
    large = [layer for layer in layers if layer.weight.numel() >= SMALLEST]
    layers = run_by_own_forward(model, sites.input_spec, large) if large else []
    if not layers:
        problem = "calls none of its large ones" if large else "has none that are large"
        raise ConfigError(
            f"base_precision={precision} quantizes linear layers, and {type(model).__name__} {problem}. "
            "Use base_precision=auto"
        )
    with torch.no_grad(), keep_heap(lean=True):  # otherwise the float32 values leave gaps: 0.7 GB for a billion
        for layer in layers:
            quantized = nn.Parameter(backend(original_values(layer.weight).detach()), requires_grad=False)
            layer.weight = keep_flag(quantized, layer.weight)
            layer.__class__ = QuantizedLinear
    return len(layers)


class QuantizedLinear(nn.Linear):
    """A linear layer whose frozen weight is quantized."""

    def forward(self, input: Tensor) -> Tensor:
        if not hasattr(self.weight, "dequantize") or type(self.weight) in (Tensor, nn.Parameter):
            return super().forward(input)  # a merge, or the meta device, has put a plain weight here
        device = input.device.type
        if torch.is_autocast_enabled(device):
            input = input.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            output: Tensor = _Product.apply(input, self.weight)
            return output if self.bias is None else output + self.bias.to(output.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """Move or convert the layer; torch's own way fails on a quantized weight that something refers to weakly."""
        weight: Any = self.weight
        if type(weight) is nn.Parameter:
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]
        self._parameters["weight"] = None
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            moved = fn(weight)
            same = (moved.device, moved.dtype) == (weight.device, weight.dtype)
            weight = weight if same else keep_flag(nn.Parameter(moved, requires_grad=False), weight)
        finally:
            self._parameters["weight"] = weight
        return self


class _Product(torch.autograd.Function):
    """x W^T with a gradient for x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return F.linear(x, _values(weight, x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ _values(ctx.weight, grads[0].dtype), None


def _values(weight: Any, dtype: torch.dtype) -> Tensor:
    values: Tensor = weight.dequantize()
    return values.to(dtype)


def _torchao_int8() -> Backend:
    """Return torchao's weight-only quantization: whole numbers of 8 bits, a scale for each row."""
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError:
        raise MissingExtra("base_precision=int8", "quantized") from None

    def quantized(weight: Tensor) -> Tensor:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=False)
        quantize_(layer, Int8WeightOnlyConfig())
        return layer.weight.detach()

    return quantized


def _bitsandbytes_nf4() -> Backend:
    """Return bitsandbytes' quantization to 4 bits, with a scale for 64 weights."""
    try:
        from petune.backbones.nf4 import quantized
    except ImportError:
        raise MissingExtra("base_precision=nf4", "quantized") from None
    return quantized


BACKENDS: dict[str, Callable[[], Backend]] = {"int8": _torchao_int8, "nf4": _bitsandbytes_nf4}
