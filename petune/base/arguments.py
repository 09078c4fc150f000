"""Arguments of public functions, checked where they come in: one error that names all that are of a wrong type."""

from __future__ import annotations

import os
from types import UnionType

from petune.base.errors import UsageError

PathText: type | UnionType = str | os.PathLike
LONGEST_SHOWN = 60


def check_arguments(call: str, /, **given: tuple[object, type | UnionType]) -> None:
    """Check types, before anything is done.

    Args:
        call: The function, for the message.
        given: For each argument its value and the type it must have.

    Raises:
        UsageError: With every argument that is something else.
    """
    wrong = [f"{name} must be {_words(kind)}, not {_shown(value)}" for name, (value, kind) in given.items()
             if not isinstance(value, kind)]  # fmt: skip
    wrong += [f"{name} must not hold a null character" for name, (value, kind) in given.items()
              if isinstance(value, str) and "\0" in value]  # fmt: skip
    if wrong:
        raise UsageError(f"{call}: {'; '.join(wrong)}")


def check_watch(call: str, watch: object) -> None:
    """Check what is told of events, before the first one comes.

    Raises:
        UsageError: It cannot be called.
    """
    if not callable(watch):
        raise UsageError(f"{call}: watch must be a function that takes an event, not {_shown(watch)}")


def check_input_size(call: str, size: object) -> None:
    """Check a (channels, height, width), or None.

    Raises:
        UsageError: It is something else.
    """
    if size is None:
        return
    if not (isinstance(size, tuple | list) and len(size) == 3 and all(isinstance(n, int) and n > 0 for n in size)):
        raise UsageError(f"{call}: input_size must be (channels, height, width), all above 0, not {_shown(size)}")


def _words(kind: type | UnionType) -> str:
    parts = [kind] if isinstance(kind, type) else list(kind.__args__)
    return " or ".join("None" if part is type(None) else getattr(part, "__name__", str(part)) for part in parts)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"
