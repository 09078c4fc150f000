"""Check argument types of public functions: one error names every argument of a wrong type."""

from __future__ import annotations

import os
from types import UnionType

from petune.base.config import shown
from petune.base.errors import UsageError

PathText: type | UnionType = str | os.PathLike
Number: type | UnionType = int | float | None
LONGEST_SHOWN = 60


def check_arguments(call: str, /, **arguments: tuple[object, type | UnionType]) -> None:
    """Check the types of arguments before anything is done with them.

    Args:
        call: The function, for the message.
        arguments: For each argument its value and its type.

    Raises:
        UsageError: Names every argument of another type, or with a null character in its text.
    """
    problems = []
    for name, (value, kind) in arguments.items():
        if not isinstance(value, kind):
            problems.append(f"{name} must be {_type_names(kind)}, not {shown(value, LONGEST_SHOWN)}")
        elif isinstance(value, str) and "\0" in value:
            problems.append(f"{name} contains a null character")
    if problems:
        raise UsageError(f"{call}: {'; '.join(problems)}")


def check_watch(call: str, watch: object) -> None:
    """Check a callback for events before the first event.

    Raises:
        UsageError: It is not callable.
    """
    if not callable(watch):
        raise UsageError(f"{call}: watch must be a function that takes an event, not {shown(watch, LONGEST_SHOWN)}")


def check_input_size(call: str, size: object) -> None:
    """Check a (channels, height, width), the same with frames, or None.

    Raises:
        UsageError: It is something else.
    """
    is_size = isinstance(size, tuple | list) and len(size) in (3, 4) and all(isinstance(n, int) and n > 0 for n in size)
    if size is not None and not is_size:
        sizes = "(channels, height, width), all positive, with a fourth number for videos"
        raise UsageError(f"{call}: input_size must be {sizes}, not {shown(size, LONGEST_SHOWN)}")


def _type_names(kind: type | UnionType) -> str:
    kinds = [kind] if isinstance(kind, type) else list(kind.__args__)
    return " or ".join("None" if each is type(None) else getattr(each, "__name__", str(each)) for each in kinds)
