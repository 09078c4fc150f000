"""Tell what operations of torch take a model's parameters as: the weight or bias of a layer, a table, a factor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from petune.sites.forward import tensors_in
from petune.sites.operations import AFFINE_NORMS, CONVOLUTIONS, JOINS, MATRIX_LAYERS, MULTI_HEAD, PRODUCTS
from petune.sites.sums import ADDITIONS, MULTIPLICATIONS

Use = Literal["matrix", "bias", "norm", "norm bias", "factor", "table", "other"]
"""What a parameter is in an operation: `norm` is a norm's scale, `table` what is added, joined or looked up."""

LAYER_USES: frozenset[str] = frozenset({"matrix", "norm", "norm bias"})
"""What makes a parameter one of a layer, also without a module of that layer's own."""
LOOKUPS = {"embedding", "__getitem__", "index_select", "gather", "take", "where"}
_BIAS_PLACES = {"linear": 2, "addmm": 0, "layer_norm": 3, "group_norm": 3, **dict.fromkeys(CONVOLUTIONS, 2)}
_QUERY_KEY_VALUE = (0, 1, 2)


def uses_in(
    name: str, args: Sequence[Any], kwargs: Mapping[str, Any], own: Mapping[int, tuple[Tensor, str]]
) -> Iterator[tuple[str, Use]]:
    """Yield the key of each parameter that an operation takes, and what it is there.

    Args:
        name: The operation.
        args, kwargs: What it takes.
        own: The parameters, and what was made of one alone, by identity, with their keys.
    """
    arguments: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for place, value in arguments:
        for tensor in tensors_in(value):
            if id(tensor) in own:
                yield own[id(tensor)][1], _use(name, place, tensor)


def _use(name: str, place: int | str, tensor: Tensor) -> Use:
    """Return what a parameter is in an operation, by the name or number of its argument."""
    if name in PRODUCTS:
        return "matrix"
    if name == MULTI_HEAD:
        return "table" if place in _QUERY_KEY_VALUE or tensor.ndim > 2 else "matrix" if tensor.ndim == 2 else "bias"
    if name in MATRIX_LAYERS | CONVOLUTIONS | AFFINE_NORMS:
        if place in ("bias", _BIAS_PLACES.get(name)):
            return "norm bias" if name in AFFINE_NORMS else "bias"
        if place in (0, "input"):
            return "table"  # a token that goes through a layer
        return "norm" if name in AFFINE_NORMS else "matrix"
    if name in ADDITIONS | JOINS | LOOKUPS:
        return "table"
    return "factor" if name in MULTIPLICATIONS else "other"
