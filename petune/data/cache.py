"""Images are decoded once; the result lies in the cache directory as arrays that are memory-mapped."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from petune.base.config import expand_home
from petune.base.errors import DataError
from petune.data.dataset import Split

LOCK = ".lock"
ELSEWHERE = "set PETUNE_CACHE to another folder"
Allocate = Callable[[int, int], NDArray[np.uint8]]
"""(number of images N, side S) to an array (N, S, S, 3) that lies on disk, so it may exceed the memory."""
Decode = Callable[[Allocate], tuple[NDArray[np.int64], NDArray[np.int64]]]
"""Fills the images it allocates (once) and returns their labels and rows, int64 (N,); see `Split`."""


def cache_dir() -> Path:
    """`PETUNE_CACHE`, or `petune` in the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return expand_home(os.environ.get("PETUNE_CACHE") or Path(base) / "petune")


def decoded(key: dict[str, Any], decode: Decode, crop: float = 1.0) -> Split:
    """The split that `decode` makes, decoded now or by an earlier run with the same key.

    Args:
        key: All that the pixels depend on (files with size and time, size of the images, format number).
        decode: See `Decode`.
        crop: See `Split`.

    Raises:
        DataError: The cache directory cannot be written, or is full.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    place = cache_dir() / "decoded" / digest
    was_there = place.exists()
    split = _read(place, crop)
    if split is None:
        if was_there:  # damaged; what came since was finished by another process
            shutil.rmtree(place, ignore_errors=True)
        _write(place, key, decode)
        split = _read(place, crop)
    if split is None:
        raise DataError(f"the cache {place} must be readable once written, but is not; {ELSEWHERE}")
    return split


def file_key(path: Path) -> list[Any]:
    """Name, size and modification time: a file that changes is decoded again."""
    stat = path.stat()
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns]


def _read(place: Path, crop: float) -> Split | None:
    try:
        images = np.load(place / "images.npy", mmap_mode="r")
        labels = np.load(place / "labels.npy")
        rows = np.load(place / "rows.npy")
    except (OSError, ValueError, EOFError):
        return None
    return Split(images, labels, rows, crop) if len(images) == len(labels) == len(rows) else None


def _write(place: Path, key: dict[str, Any], decode: Decode) -> None:
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with (place.parent / LOCK).open("a") as lock:
            _remove_stumps(place.parent, lock)
            temporary = Path(tempfile.mkdtemp(dir=place.parent, prefix=".new-"))
            try:
                _fill(temporary, key, decode)
                os.rename(temporary, place)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        if not place.exists():  # otherwise another process was faster, and its arrays are the same
            raise DataError(f"the cache {place} cannot be written ({error}); {ELSEWHERE}") from None


def _fill(place: Path, key: dict[str, Any], decode: Decode) -> None:
    labels, rows = decode(lambda count, side: _allocate(place / "images.npy", count, side))
    np.save(place / "labels.npy", labels)
    np.save(place / "rows.npy", rows)
    (place / "key.json").write_text(json.dumps(key, indent=1))


def _remove_stumps(parent: Path, lock: IO[str]) -> None:
    """Take away what killed processes were writing, if nobody writes now; then hold `lock` as one who writes."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        pass  # others write
    else:
        for stump in parent.glob(".new-*"):
            shutil.rmtree(stump, ignore_errors=True)
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(lock, fcntl.LOCK_SH)


def _allocate(path: Path, count: int, side: int) -> NDArray[np.uint8]:
    need, have = count * side * side * 3, shutil.disk_usage(path.parent).free
    # A full disk must be noticed here: writing to a mapped file without room ends the process (SIGBUS).
    if need > have:
        raise DataError(
            f"the decoded images need {need:,} bytes in {path.parent.parent}, but only {have:,} are free; "
            f"make room or {ELSEWHERE}"
        )
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(count, side, side, 3))
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array
