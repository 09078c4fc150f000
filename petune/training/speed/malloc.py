"""What glibc does with freed activations while training on a CPU."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""glibc's malloc.h."""
LARGEST = 32 << 20
"""From this size on glibc always asks the system; it takes no more."""
LEAN = 16 << 20


@contextmanager
def keep_heap(lean: bool) -> Iterator[bool]:
    """Inside, freed memory stays with the process, so that the next step need not fault it in again, page by page.

    By itself glibc moves both of its thresholds with what it happens to free. On the machine of docs/speed.md that
    costs 3 to 10 % of a step of AdaptFormer, and a peak between 3.4 and 4.9 GB where it is 3.5 with fixed ones (ViT-B
    at 224, batch 32).

    Args:
        lean: Memory counts more than time: large activations go back to the system at once, since a heap is left with
            gaps. With recomputed blocks 1.84 GB instead of 2.4, and 12.9 s a step instead of 11.3.

    Yields:
        Whether it does anything: not where malloc is not glibc's, or the user has set it.
    """
    libc = _glibc()
    if libc is None:
        yield False
        return
    libc.mallopt(MMAP_THRESHOLD, LEAN if lean else LARGEST)
    libc.mallopt(TRIM_THRESHOLD, LEAN if lean else -1)  # -1: never
    try:
        yield True
    finally:  # where glibc's own thresholds end up; fixed from now on, which glibc cannot take back
        libc.mallopt(MMAP_THRESHOLD, LARGEST)
        libc.mallopt(TRIM_THRESHOLD, 2 * LARGEST)
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return None
    try:
        found = os.confstr("CS_GNU_LIBC_VERSION")
    except (ValueError, AttributeError, OSError):  # macOS, Windows, musl
        return None
    return ctypes.CDLL(None) if found and found.startswith("glibc") else None
