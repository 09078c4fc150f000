"""Look at each video once: how many frames it has, or why it cannot be decoded; kept in the cache."""

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
        paths: The files. All are decoded, one thread per core, unless they were looked at before.

    Raises:
        MissingExtra: PyAV is not installed.
    """
    check_decoder()
    key = [FORMAT, [[str(path.absolute()), *size_and_time(path)] for path in paths]]
    cached = cache_dir() / "videos" / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):
        return [value if isinstance(value, str) else VideoInfo(*value) for value in json.loads(cached.read_text())]
    with ThreadPoolExecutor(num_threads()) as pool:
        results = list(pool.map(_look_at, paths))
    values = [value if isinstance(value, str) else astuple(value) for value in results]
    with contextlib.suppress(OSError, CheckpointError):  # they are looked at again in the next run
        replace_file(cached, json.dumps(values).encode())
    return results


def _look_at(path: Path) -> VideoInfo | str:
    try:
        return read_info(path)
    except DataError as error:
        return str(error)
