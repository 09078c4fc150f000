"""Transfers that end with an error when nothing has moved for some seconds; huggingface_hub's own calls may hang."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

STALL_TIMEOUT_S = 8.0


@contextlib.contextmanager
def small_chunks() -> Iterator[None]:
    """Let huggingface_hub transfer in small chunks inside the block, so that a slow transfer does not look stalled."""
    from huggingface_hub import constants

    before = constants.DOWNLOAD_CHUNK_SIZE, constants.HF_HUB_DISABLE_XET
    constants.DOWNLOAD_CHUNK_SIZE, constants.HF_HUB_DISABLE_XET = 1 << 18, True
    try:
        yield
    finally:
        constants.DOWNLOAD_CHUNK_SIZE, constants.HF_HUB_DISABLE_XET = before


def while_progressing(transfer: Callable[[], Any], moved: Callable[[], int], timeout_s: float | None = None) -> Any:
    """Return the result of `transfer` as long as it makes progress.

    Args:
        transfer: Called in a thread, which is abandoned when it stalls.
        moved: Returns the bytes moved so far; an error that it raises ends the waiting.
        timeout_s: How long that number may stay the same; STALL_TIMEOUT_S by default.

    Raises:
        TimeoutError: Nothing moved for that long.
    """
    patience_s = STALL_TIMEOUT_S if timeout_s is None else timeout_s
    done: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue()

    def work() -> None:
        try:
            done.put((transfer(), None))
        except BaseException as error:
            done.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    before, since = -1, time.monotonic()
    while time.monotonic() - since < patience_s:
        with contextlib.suppress(queue.Empty):
            result, error = done.get(timeout=0.2)
            if error is not None:
                raise error
            return result
        now = moved()
        if now != before:
            before, since = now, time.monotonic()
    raise TimeoutError(f"no data for {patience_s:.0f} s")


def directory_size(path: Path) -> int:
    """Return the bytes of all files below a directory, which may not exist yet."""
    total = 0
    for file in path.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
            total += file.stat().st_size if file.is_file() else 0
    return total
