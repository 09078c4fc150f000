"""Cache decoded images on disk, as memory-mapped arrays; where they do not fit, they are decoded on request."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from petune.base.config import expand_home
from petune.base.errors import DataError
from petune.data.dataset import Split
from petune.data.on_request import OnRequest, ReadRow, scratch
from petune.data.squares import PIXEL_FORMAT

LOCK_FILE = ".lock"
USE_ANOTHER_CACHE = "set PETUNE_CACHE to another directory"
MAX_SHARE_OF_DISK = 0.9
CACHE_GB = 50.0
"""Default of the largest size of a split in the cache: 250,000 photos for models with images of 224 pixels."""
Allocate = Callable[..., NDArray[Any]]
"""(N images, side S, channels=3, dtype="uint8") to an array (N, S, S, C) on disk; it may be larger than the memory."""
Decode = Callable[[Allocate], tuple[NDArray[np.int64], NDArray[np.int64]]]
"""Allocates the images (once), fills them, and returns their labels and rows, int64 (N,); see `Split`."""
IsCurrent = Callable[[Split], bool]
"""Tells if a stored split is still right: a file that was not readable may be now, with the same size and time."""


def cache_dir() -> Path:
    """Return `PETUNE_CACHE`, or `petune` in the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return expand_home(os.environ.get("PETUNE_CACHE") or Path(base) / "petune")


@dataclass(frozen=True)
class Fallback:
    """Reading of images that do not fit the cache.

    Attributes:
        read: Decodes the image of a row to the pixels that `Decode` puts there.
        limit_gb: Largest size of the images of a split in the cache, in 10⁹ bytes.
    """

    read: ReadRow
    limit_gb: float


class _TooLarge(Exception):
    """Images that do not fit the cache.

    Attributes:
        shape, dtype: Theirs.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        super().__init__(shape)
        self.shape = shape
        self.dtype = dtype


def cached_split(
    key: dict[str, Any],
    decode: Decode,
    crop: float = 1.0,
    fallback: Fallback | None = None,
    is_current: IsCurrent = lambda stored: True,
) -> Split:
    """Return the split that `decode` yields, decoded now or by an earlier run with the same key.

    Args:
        key: Everything that the pixels depend on: files with size and time, size of the images, format number.
        decode: See `Decode`.
        crop: See `Split`.
        fallback: Reads images that do not fit the cache. `decode` then gets an array that keeps no pixels, so that
            images are checked all the same, and only targets and rows are stored.
        is_current: See `IsCurrent`.

    Raises:
        DataError: The cache directory is full or not writable; or the images do not fit, and there is no fallback.
    """
    path = _path_of(key)
    try:
        return _cached(path, key, _Allocator(decode, fallback), crop, is_current)
    except _TooLarge as error:
        if fallback is None:
            raise
        without_pixels = _Allocator(decode, fallback, keep=False)
        checked = _cached(path.with_name(f"{path.name}-targets"), key, without_pixels, crop, is_current)
        return replace(checked, images=OnRequest(fallback.read, error.shape, error.dtype))


def stored_split(key: dict[str, Any], crop: float = 1.0) -> Split | None:
    """Return the split that `cached_split` stored for this key in an earlier run; None if it did not."""
    return _read(_path_of(key), crop)


def _path_of(key: dict[str, Any]) -> Path:
    text = json.dumps(_with_format(key), sort_keys=True)
    return cache_dir() / "decoded" / hashlib.sha256(text.encode()).hexdigest()[:24]


def _with_format(key: dict[str, Any]) -> dict[str, Any]:
    return {**key, "pixels": PIXEL_FORMAT}


def _cached(path: Path, key: dict[str, Any], allocator: _Allocator, crop: float, is_current: IsCurrent) -> Split:
    split = _read(path, crop)
    if split is None or not is_current(split):
        with alone(path):
            split = _read_or_write(path, key, allocator, crop, is_current)
    if split is None:
        raise DataError(f"cannot read back the cache {path} that was just written; {USE_ANOTHER_CACHE}")
    return split


def _read_or_write(
    path: Path, key: dict[str, Any], allocator: _Allocator, crop: float, is_current: IsCurrent
) -> Split | None:
    existed = path.exists()
    split = _read(path, crop)
    if split is None or not is_current(split):
        if existed:  # it is damaged or old; a directory that appeared since then was finished by another process
            shutil.rmtree(path, ignore_errors=True)
        _write(path, key, allocator)
        split = _read(path, crop)
    return split


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Wait until no other process makes the same path, and keep others from it; without locks, do neither."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):  # Windows, a file system without locks
            import fcntl

            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.with_name(f"{LOCK_FILE}-{path.name}")
            fcntl.flock(stack.enter_context(file.open("a")), fcntl.LOCK_EX)
            stack.callback(file.unlink, missing_ok=True)  # who waits for it finds the path
        yield


@dataclass(frozen=True)
class _Allocator:
    """Calls `decode` with room for its images.

    Attributes:
        keep: Store the pixels; else only targets and rows.
    """

    decode: Decode
    fallback: Fallback | None
    keep: bool = True

    def fill(self, path: Path) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Write images.npy, and return targets and rows."""

        def allocate(count: int, side: int, channels: int = 3, dtype: str = "uint8") -> NDArray[Any]:
            return self._allocate(path, (count, side, side, channels), np.dtype(dtype))

        return self.decode(allocate)

    def _allocate(self, path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        if not self.keep:
            np.save(path, np.empty((shape[0], 0), np.uint8))
            return scratch(shape, dtype)
        fallback, size = self.fallback, math.prod(shape) * dtype.itemsize
        if fallback is not None and size > room_in_cache(fallback.limit_gb):
            raise _TooLarge(shape, dtype)
        return _allocate(path, shape, dtype)


def room_in_cache(limit_gb: float) -> float:
    """Return how many bytes the decoded images of a split may take.

    Args:
        limit_gb: See `Fallback`.
    """
    existing = next(path for path in (cache_dir().absolute(), *cache_dir().absolute().parents) if path.exists())
    return min(limit_gb * 1e9, MAX_SHARE_OF_DISK * shutil.disk_usage(existing).free)


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


def _write(path: Path, key: dict[str, Any], allocator: _Allocator) -> None:
    try:
        with temporary_dir(path.parent) as temporary:
            _fill(temporary, key, allocator)
            os.rename(temporary, path)
    except OSError as error:
        if not path.exists():  # otherwise another process was faster and wrote the same arrays
            raise DataError(f"cannot write the cache {path} ({error}); {USE_ANOTHER_CACHE}") from None


def _fill(path: Path, key: dict[str, Any], allocator: _Allocator) -> None:
    labels, rows = allocator.fill(path / "images.npy")
    np.save(path / "labels.npy", labels)
    np.save(path / "rows.npy", rows)
    (path / "key.json").write_text(json.dumps(_with_format(key), indent=1))


@contextlib.contextmanager
def temporary_dir(parent: Path) -> Iterator[Path]:
    """Make a directory to fill and then rename; what is not renamed is deleted, also what killed processes left.

    Raises:
        OSError: The parent is not writable.
    """
    parent.mkdir(parents=True, exist_ok=True)
    with (parent / LOCK_FILE).open("a") as lock:
        _remove_abandoned(parent, lock)
        temporary = Path(tempfile.mkdtemp(dir=parent, prefix=".new-"))
        try:
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


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


def _allocate(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    need, free = math.prod(shape) * dtype.itemsize, shutil.disk_usage(path.parent).free
    # Check for a full disk now: writing to a memory-mapped file without space kills the process (SIGBUS).
    if need > free:
        raise DataError(
            f"not enough disk space for the decoded images in {path.parent.parent}: {need:,} bytes needed, {free:,} "
            f"free. Make room, or {USE_ANOTHER_CACHE}"
        )
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array
