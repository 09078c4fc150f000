"""Cache decoded images on disk, as memory-mapped arrays."""

from __future__ import annotations

import contextlib
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

LOCK_FILE = ".lock"
USE_ANOTHER_CACHE = "set PETUNE_CACHE to another directory"
Allocate = Callable[[int, int], NDArray[np.uint8]]
"""(number of images N, side S) to an array (N, S, S, 3) on disk; it may be larger than the memory."""
Decode = Callable[[Allocate], tuple[NDArray[np.int64], NDArray[np.int64]]]
"""Allocates the images (once), fills them, and returns their labels and rows, int64 (N,); see `Split`."""


def cache_dir() -> Path:
    """Return `PETUNE_CACHE`, or `petune` in the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return expand_home(os.environ.get("PETUNE_CACHE") or Path(base) / "petune")


def cached_split(key: dict[str, Any], decode: Decode, crop: float = 1.0) -> Split:
    """Return the split that `decode` yields, decoded now or by an earlier run with the same key.

    Args:
        key: Everything that the pixels depend on: files with size and time, size of the images, format number.
        decode: See `Decode`.
        crop: See `Split`.

    Raises:
        DataError: The cache directory is full or not writable.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    path = cache_dir() / "decoded" / digest
    existed = path.exists()
    split = _read(path, crop)
    if split is None:
        if existed:  # it is damaged; a directory that appeared since then was finished by another process
            shutil.rmtree(path, ignore_errors=True)
        _write(path, key, decode)
        split = _read(path, crop)
    if split is None:
        raise DataError(f"cannot read back the cache {path} that was just written; {USE_ANOTHER_CACHE}")
    return split


def file_key(path: Path) -> list[Any]:
    """Return path, size and modification time, so that a changed file is decoded again."""
    stat = path.stat()
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns]


def _read(path: Path, crop: float) -> Split | None:
    try:
        images = np.load(path / "images.npy", mmap_mode="r")
        labels = np.load(path / "labels.npy")
        rows = np.load(path / "rows.npy")
    except (OSError, ValueError, EOFError):
        return None
    return Split(images, labels, rows, crop) if len(images) == len(labels) == len(rows) else None


def _write(path: Path, key: dict[str, Any], decode: Decode) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (path.parent / LOCK_FILE).open("a") as lock:
            _remove_abandoned(path.parent, lock)
            temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=".new-"))
            try:
                _fill(temporary, key, decode)
                os.rename(temporary, path)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        if not path.exists():  # otherwise another process was faster and wrote the same arrays
            raise DataError(f"cannot write the cache {path} ({error}); {USE_ANOTHER_CACHE}") from None


def _fill(path: Path, key: dict[str, Any], decode: Decode) -> None:
    labels, rows = decode(lambda count, side: _allocate(path / "images.npy", count, side))
    np.save(path / "labels.npy", labels)
    np.save(path / "rows.npy", rows)
    (path / "key.json").write_text(json.dumps(key, indent=1))


def _remove_abandoned(parent: Path, lock: IO[str]) -> None:
    """Delete what killed processes left if no process is writing, then hold `lock` as a writer."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        pass  # other processes are writing
    else:
        for abandoned in parent.glob(".new-*"):
            shutil.rmtree(abandoned, ignore_errors=True)
    with contextlib.suppress(OSError):  # the file system has no locks
        fcntl.flock(lock, fcntl.LOCK_SH)


def _allocate(path: Path, count: int, side: int) -> NDArray[np.uint8]:
    need, free = count * side * side * 3, shutil.disk_usage(path.parent).free
    # Check for a full disk now: writing to a memory-mapped file without space kills the process (SIGBUS).
    if need > free:
        raise DataError(
            f"not enough disk space for the decoded images in {path.parent.parent}: {need:,} bytes needed, {free:,} "
            f"free. Make room, or {USE_ANOTHER_CACHE}"
        )
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(count, side, side, 3))
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array
