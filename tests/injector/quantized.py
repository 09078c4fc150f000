"""Int8 weight-only quantization as a tensor subclass, as torchao makes it, in the few lines that tests need."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten


class Int8Weight(Tensor):
    """A float matrix that is kept as int8 rows and one scale a row."""

    rows: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, rows: Tensor, scale: Tensor) -> Int8Weight:
        return Tensor._make_wrapper_subclass(cls, rows.shape, dtype=scale.dtype, device=rows.device)  # type: ignore

    def __init__(self, rows: Tensor, scale: Tensor) -> None:
        self.rows = rows
        self.scale = scale

    @classmethod
    def quantized(cls, weight: Tensor) -> Int8Weight:
        scale = weight.detach().abs().amax(1, keepdim=True) / 127
        return cls((weight.detach() / scale).round().to(torch.int8), scale)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["rows", "scale"], None

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], context: None, size: Any, stride: Any) -> Int8Weight:
        return Int8Weight(parts["rows"], parts["scale"])

    def values(self) -> Tensor:
        return self.rows.to(self.scale.dtype) * self.scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in {aten.detach.default, aten.clone.default, aten._to_copy.default, aten.alias.default}:
            options = {key: value for key, value in (kwargs or {}).items() if key == "dtype"}
            copied = func not in {aten.detach.default, aten.alias.default}
            parts = (args[0].rows, args[0].scale)
            return cls(*(part.clone() for part in parts) if copied else parts) if not options else args[0].values()
        plain = [tree_map_only(Int8Weight, Int8Weight.values, value) for value in (args, kwargs or {})]
        return func(*plain[0], **plain[1])


class OpaqueWeight(Int8Weight):
    """A quantized matrix that does not say what it is made of; operations give its values."""

    __tensor_flatten__ = None  # type: ignore[assignment]


class LockedWeight(OpaqueWeight):
    """One whose values no operation but a product gives."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten.view.default:
            raise NotImplementedError("view of a LockedWeight")
        return super().__torch_dispatch__(func, types, args, kwargs)


class ConstantWeight(Int8Weight):
    """One that nothing can change in place or compare, as torchao's."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        compares = func is aten.equal.default
        if (func._schema.is_mutable or compares) and isinstance(args[0], cls):
            raise NotImplementedError(f"{func} of a ConstantWeight")
        return super().__torch_dispatch__(func, types, args, kwargs)


class Float8Weight(Int8Weight):
    """One whose parts are all floating-point."""

    @classmethod
    def quantized(cls, weight: Tensor) -> Int8Weight:
        scale = weight.detach().abs().amax(1, keepdim=True)
        return cls((weight.detach() / scale).to(torch.float8_e4m3fn), scale)


def quantize(model: nn.Module, kind: type[Int8Weight] = Int8Weight, *, with_head: bool = False) -> nn.Module:
    """The model with the weights of its linear layers quantized, by default without the classifier."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and (with_head or path != "head"):
            module.weight = nn.Parameter(kind.quantized(module.weight), requires_grad=False)
    return model
