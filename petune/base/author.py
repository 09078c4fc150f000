"""Name the file and the line of an author's code where an error was raised, for messages."""

from __future__ import annotations

import importlib.util
import traceback
from functools import cache
from pathlib import Path

PETUNE = Path(__file__).resolve().parents[1]
LIBRARIES = ("torch", "timm", "torchvision", "transformers", "peft")


def line_of(error: BaseException) -> str:
    """Return where the author's code raised an error, as ` (file.py:12)`; empty if only libraries did."""
    frames = _frames(error)
    tuners = [f for f in frames if PETUNE / "tuners" in Path(f.filename).parents]
    last = next(reversed(_own(frames) or tuners), None)
    return "" if last is None else f" ({Path(last.filename).name}:{last.lineno})"


def is_authors(error: BaseException) -> bool:
    """Return True if the error comes from code that belongs neither to petune nor to the usual libraries."""
    return bool(_own(_frames(error)))


def forward_of(adapter: type) -> str:
    """Return where an author's adapter has its forward, as ` (file.py:12)`; empty for one of petune or a library."""
    code = getattr(getattr(adapter, "forward", None), "__code__", None)
    if code is None or code.co_filename.startswith(_library_folders()):
        return ""
    return f" ({Path(code.co_filename).name}:{code.co_firstlineno})"


def adapter_that_raised(error: BaseException) -> type | None:
    """Return the class of the adapter in whose call the error was raised; None if it was raised elsewhere."""
    classes = [
        type(frame.f_locals["self"].adapter)
        for frame, _ in traceback.walk_tb(error.__traceback__)
        if frame.f_code.co_name == "call" and hasattr(frame.f_locals.get("self"), "is_petune_module")
    ]
    return classes[-1] if classes else None


def _frames(error: BaseException) -> list[traceback.FrameSummary]:
    while error.__cause__ is not None:
        error = error.__cause__
    return list(traceback.extract_tb(error.__traceback__))


def _own(frames: list[traceback.FrameSummary]) -> list[traceback.FrameSummary]:
    return [f for f in frames if not f.filename.startswith(_library_folders()) and not f.filename.startswith("<frozen")]


@cache
def _library_folders() -> tuple[str, ...]:
    """Return the folders of code that is not the author's; plugins may be installed next to them."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        return (str(PETUNE),)
    installed = Path(torch.origin).parents[1]
    return (str(PETUNE), *(str(installed / name) for name in LIBRARIES))
