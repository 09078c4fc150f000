"""A frozen weight in the four bits of bitsandbytes: NormalFloat, with a scale for each 64 weights (2305.14314)."""

from __future__ import annotations

from typing import Any

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

BLOCK = 64


class NF4Weight(Tensor):
    """A weight that is stored in four bits; `dequantize` returns its values.

    Args:
        packed: Two weights in each byte.
        absmax: A scale for each block of weights.
        shape: Of the weight.
        dtype: Of its values.
    """

    @staticmethod
    def __new__(cls, packed: Tensor, absmax: Tensor, shape: torch.Size, dtype: torch.dtype) -> NF4Weight:
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=packed.device)
        made.packed, made.absmax = packed, absmax
        return made

    packed: Tensor
    absmax: Tensor

    def __repr__(self) -> str:  # type: ignore[override]
        return f"NF4Weight({tuple(self.shape)})"

    def __tensor_flatten__(self) -> tuple[list[str], tuple[torch.Size, torch.dtype]]:
        return ["packed", "absmax"], (self.shape, self.dtype)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: Any, outer_size: Any, outer_stride: Any) -> NF4Weight:
        return NF4Weight(inner["packed"], inner["absmax"], *meta)

    def dequantize(self) -> Tensor:
        """Return the values."""
        state = bnb.QuantState(
            self.absmax, self.shape, bnb.get_4bit_type("nf4", device=self.packed.device), BLOCK, "nf4", self.dtype
        )
        return bnb.dequantize_4bit(self.packed, state)  # type: ignore[no-any-return]

    def moved(self, change: Any) -> NF4Weight:
        """Return a weight whose parts are changed, such as copied to a device."""
        return NF4Weight(change(self.packed), change(self.absmax), self.shape, self.dtype)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        aten = torch.ops.aten
        if func in (aten.detach.default, aten.alias.default):
            return args[0].moved(lambda part: part)
        if func is aten.clone.default:
            return args[0].moved(torch.clone)
        if func is aten._to_copy.default:
            device, dtype = kwargs.get("device"), kwargs.get("dtype") or args[0].dtype
            packed, absmax = (part.to(device, copy=True) for part in (args[0].packed, args[0].absmax))
            return NF4Weight(packed, absmax, args[0].shape, dtype)
        plain = [a.dequantize() if isinstance(a, NF4Weight) else a for a in args]
        return func(*plain, **kwargs)


def quantized(weight: Tensor) -> Tensor:
    """Return a weight in four bits."""
    packed, state = bnb.quantize_4bit(weight.contiguous(), blocksize=BLOCK, quant_type="nf4")
    return NF4Weight(packed, state.absmax, weight.shape, weight.dtype)
