"""Take hooks off again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch.utils.hooks import RemovableHandle


@contextmanager
def removed_after(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove hooks when the context ends, also by an exception."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
