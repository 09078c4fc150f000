"""Look at each video once: how many frames it has; kept in the cache. One that cannot be decoded is looked at again."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from pathlib import Path

from petune.base.errors import CheckpointError, DataError
from petune.base.files import replace_file
from petune.data.cache import cache_dir
from petune.data.find_images import size_and_time
from petune.data.images import num_threads
from petune.data.video.decode import VideoInfo, check_decoder, read_info

FORMAT = 1
"""Raised when another number of frames would be counted in the same file."""


def scan_videos(paths: Sequence[Path]) -> list[VideoInfo | str]:
    """Return what is in each video, or why it cannot be decoded.

    Args:
        paths: The files. All are decoded, one thread per core, unless they were decoded before: one that could not be
            may have got another owner or mode since, which changes neither its size nor its time.

    Raises:
        MissingExtra: PyAV is not installed.
    """
    check_decoder()
    key = [FORMAT, [[str(path.absolute()), *size_and_time(path)] for path in paths]]
    cached = cache_dir() / "videos" / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]}.json"
    known = _read(cached) or [None] * len(paths)
    with ThreadPoolExecutor(num_threads()) as pool:
        results = list(pool.map(lambda info, path: info or _look_at(path), known, paths))
    values = [None if isinstance(value, str) else value for value in results]
    if values != known or not cached.exists():
        content = json.dumps([None if value is None else astuple(value) for value in values])
        with contextlib.suppress(OSError, CheckpointError):  # they are looked at again in the next run
            replace_file(cached, content.encode())
    return results


def _read(cached: Path) -> list[VideoInfo | None] | None:
    """Return what is known of each video, None for one that could not be decoded; None if nothing is known."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        values = json.loads(cached.read_text())
        return [None if value is None or isinstance(value, str) else VideoInfo(*value) for value in values]
    return None


def _look_at(path: Path) -> VideoInfo | str:
    try:
        return read_info(path)
    except DataError as error:
        return str(error)
