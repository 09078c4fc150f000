"""Recognize sums in a forward, in whatever operation they are written: a residual connection is one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from petune.sites.flow import is_in_place
from petune.sites.operations import ACTIVATIONS
from petune.sites.trace import TOKENS, Addition, Scaling, Trace, is_vector

ADDITIONS = {"add", "add_", "__add__", "__radd__", "__iadd__"}
MULTIPLICATIONS = {"mul", "mul_", "__mul__", "__rmul__", "__imul__"}
DIVISIONS = {"div", "div_", "divide", "divide_", "true_divide", "true_divide_", "__truediv__", "__itruediv__"}
CASTS = {"to", "float", "half", "bfloat16", "double", "type", "type_as", "_to_copy"}
DIFFERENCES = {"sub", "sub_", "subtract", "subtract_", "__sub__", "__isub__"}
PRODUCTS_ADDED = {"addcmul", "addcmul_"}
MIXES = {"lerp", "lerp_"}
REVERSED_DIFFERENCES = {"rsub", "__rsub__"}
STACKS = {"stack"}
REDUCTIONS = {"sum", "mean"}
ELEMENTWISE = ADDITIONS | DIFFERENCES | REVERSED_DIFFERENCES | PRODUCTS_ADDED | MULTIPLICATIONS | DIVISIONS | CASTS
IN_PLACE = {name for name in ELEMENTWISE | MIXES if is_in_place(name)} | {f"{name}_" for name in ACTIVATIONS}


def renamed(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> Any:
    """Return tokens that an operation such as `x += y` has changed as another tensor on the same memory.

    Python then calls that x. Before and after it, x is not the same stream.
    """
    is_changed = bool(args) and result is args[0] and (name in IN_PLACE or bool(kwargs.get("inplace")))
    if not is_changed or isinstance(result, nn.Parameter) or result.ndim not in TOKENS:
        return result
    return result.view(result.shape)


@dataclass(frozen=True)
class Term:
    """An operand of a sum.

    Attributes:
        tensor: The operand, before it was scaled; of a product both factors are terms that share `product`.
        product: Stands for the operand times numbers, or times one number for each channel; None if it is added as it
            is.
    """

    tensor: Tensor
    product: Tensor | None = None


class SumRecorder:
    """Adds the sums of a forward to its trace.

    Args:
        trace: The forward.
        tick: Returns the next time on its clock.
    """

    def __init__(self, trace: Trace, tick: Callable[[], int]) -> None:
        self.trace = trace
        self.tick = tick
        self._stacks: dict[int, tuple[Tensor, Sequence[Tensor], int]] = {}
        self._sums: dict[int, Addition] = {}

    def record(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        """Record an operation if it is a sum, or a stack that is summed later; not one that changes its operand."""
        if not isinstance(result, Tensor) or any(x is result for x in args):
            return
        if name in ELEMENTWISE:
            operands = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.shape == result.shape)
            self.trace.elementwise[id(result)] = result, tuple(operands)
        if name in CASTS:
            self._record_cast(args[0], result)
        elif name in STACKS:
            tensors = kwargs.get("tensors", args[0] if args else ())
            dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
            self._stacks[id(result)] = result, tuple(tensors), dim % result.ndim
        elif terms := self._terms(name, args, kwargs, result):
            self._record_sum([term.tensor if term.product is None else term.product for term in terms], result)
            self.trace.scalings += [Scaling(term.tensor, term.product) for term in terms if term.product is not None]

    def _record_sum(self, operands: Iterable[Tensor], result: Tensor) -> None:
        addition = self._sums[id(result)] = Addition(self.tick(), tuple(dict.fromkeys(operands)), result)
        self.trace.additions.append(addition)
        if len(addition.operands) == 1 and addition.operands[0].shape == result.shape:  # Python's sum starts at 0
            self.trace.casts.append((addition.operands[0], result))

    def _record_cast(self, x: Any, result: Tensor) -> None:
        """Record a tensor in another dtype: the same stream, and the same sum if it is one."""
        if isinstance(x, Tensor):
            self.trace.casts.append((x, result))
            if id(x) in self._sums:
                self._record_sum(self._sums[id(x)].operands, result)

    def _terms(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], result: Tensor) -> list[Term]:
        if name in ADDITIONS:
            tensors = [x for x in (*args, kwargs.get("other")) if isinstance(x, Tensor)]
            return [Term(x, _scaled(i and kwargs.get("alpha", 1) != 1)) for i, x in enumerate(tensors)]
        if name in REDUCTIONS:
            return self._terms_of_stack(name, args, kwargs)
        values = [*args, *(kwargs[key] for key in ("tensor1", "tensor2", "other", "end", "weight") if key in kwargs)]
        of_result = [x for x in values[:2] if isinstance(x, Tensor) and x.shape == result.shape]
        if name in DIFFERENCES and len(of_result) == 2:  # else a mean or a constant is subtracted
            return [Term(of_result[0]), Term(of_result[1], _scaled(True))]
        if name in REVERSED_DIFFERENCES and len(of_result) == 2:
            return [Term(of_result[1]), Term(of_result[0], _scaled(True))]
        if name in MIXES and len(of_result) == 2 and _is_factor(values[2]):
            return [Term(x, _scaled(True)) for x in of_result]
        return _terms_of_product(values, result) if name in PRODUCTS_ADDED else []

    def _terms_of_stack(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Term]:
        """Return the tensors of a stack that is summed, or averaged, over its own dimension."""
        stack, tensors, dim = self._stacks.get(id(args[0]) if args else 0, (None, (), 0))
        summed = kwargs.get("dim", args[1] if len(args) > 1 else None)
        dims = [summed] if isinstance(summed, int) else [*(summed or ())]
        if stack is None or len(dims) != 1 or dims[0] % stack.ndim != dim or kwargs.get("keepdim", len(args) > 2):
            return []
        return [Term(x, _scaled(name == "mean")) for x in tensors]


def _terms_of_product(values: Sequence[Any], result: Tensor) -> list[Term]:
    """Return the terms of x + value · factor · y, where one of the factors may be one number for each channel."""
    x, *factors = values[:3]
    if x.shape != result.shape:
        return []
    product = torch.empty(0, device="meta")
    scaled = [y for y, factor in (factors, factors[::-1]) if y.shape == result.shape and is_vector(factor)]
    return [Term(x), *(Term(y, product) for y in scaled)] if scaled else [Term(x), Term(product)]


def _scaled(is_scaled: Any) -> Tensor | None:
    """Return a tensor that stands for a scaled operand, of which the forward has none."""
    return torch.empty(0, device="meta") if is_scaled else None


def _is_factor(weight: Any) -> bool:
    return not isinstance(weight, Tensor) or is_vector(weight)
