"""Read what a model returns: a tensor, containers of tensors, or objects of classes of its own that hold them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

NO_CONTENT = (nn.Module, type, ModuleType, FunctionType, MethodType)
"""Kinds of attributes that lead away from what an object holds, such as to the model that has made it."""


def logits_in(output: Any) -> Any:
    """Return what is called `logits` in a model's output, an attribute (transformers) or an entry; else the output."""
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]
    return getattr(output, "logits", output)


def tensors_returned(output: Any) -> Iterator[Tensor]:
    """Yield the tensors in what a model returns, in order: in containers, and in the attributes of any object.

    Modules are not entered, and no object twice: it may refer to the model, or to itself.
    """
    yield from _tensors(output, set())


def attributes_of(value: object) -> Iterator[Any]:
    """Yield the attributes of an object: those in its `__dict__`, then those in slots."""
    yield from [*getattr(value, "__dict__", {}).values()]
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        names = [slots] if isinstance(slots, str) else slots
        yield from (getattr(value, name) for name in names if name != "__dict__" and hasattr(value, name))


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item, seen)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item, seen)
    elif not isinstance(value, NO_CONTENT) and id(value) not in seen:
        seen.add(id(value))
        for item in attributes_of(value):
            yield from _tensors(item, seen)
