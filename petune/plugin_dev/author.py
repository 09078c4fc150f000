"""Find functions of an author's code that hold a part of the model, for messages."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn


def closures_over(adapter: nn.Module, model: nn.Module) -> Iterator[str]:
    """Yield a description of each function of an adapter that holds a module or tensor of the model.

    Args:
        adapter: Its own attributes and methods, and those of its submodules, are looked at.
        model: The model that the adapter is attached to.
    """
    known = {id(m) for m in model.modules()} | {id(p) for p in model.parameters()} | {id(b) for b in model.buffers()}
    for module in adapter.modules():
        for name, value in (*vars(type(module)).items(), *vars(module).items()):
            if any(id(item) in known for item in _held_by(value)):
                code = getattr(getattr(value, "func", value), "__code__", None)
                line = "" if code is None else f" ({Path(code.co_filename).name}:{code.co_firstlineno})"
                yield f"{type(module).__name__}.{name}{line}"


def _held_by(function: Any) -> Iterator[Any]:
    """Yield what a function, or a partial, holds besides its arguments: modules and tensors, also in lists."""
    if isinstance(function, nn.Module | Tensor) or not callable(function):
        return
    function = inspect.unwrap(function)
    cells = getattr(function, "__closure__", None) or ()
    found = [cell.cell_contents for cell in cells if _is_filled(cell)]
    found += [*(getattr(function, "__defaults__", None) or ()), *(getattr(function, "args", None) or ())]
    found += [*(getattr(function, "keywords", None) or {}).values(), getattr(function, "__self__", None)]
    for value in found:
        yield from value if isinstance(value, list | tuple) else (value,)


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False
