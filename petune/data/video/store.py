"""Decode the frames of videos once into the cache; where they do not fit, they are decoded each time.

Legend: N videos, M stored frames of all videos, S side in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from petune.base.errors import DataError
from petune.base.text import plural
from petune.data.cache import Allocate, cached_split, room_in_cache, stored_split
from petune.data.find_images import size_and_time
from petune.data.folder import CROP
from petune.data.images import num_threads
from petune.data.reader import ReadContext
from petune.data.video.clips import ONE_VIEW, Clips, Views
from petune.data.video.decode import CENTER, VideoInfo, read_frames
from petune.data.video.sampling import Frames, Sampling
from petune.data.video.scan import scan_videos
from petune.data.workers import image_workers

FORMAT = 1
"""Raised when the same files are decoded to other pixels, so that decoded caches are rebuilt."""
THREE_CROPS = (0.0, 0.5, 1.0)


@dataclass(frozen=True)
class Readable:
    """The videos of a split that can be decoded.

    Attributes:
        paths: N files.
        positions: Of each among all files of the split.
        infos: What is in each.
        broken: Why others cannot be decoded; they are in `paths` where every row of a table needs its place.
    """

    paths: list[Path]
    positions: NDArray[np.int64]
    infos: list[VideoInfo]
    broken: dict[Path, str]


def readable_videos(paths: Sequence[Path]) -> Readable:
    """Look at all videos of a split.

    Raises:
        MissingExtra: PyAV is not installed.
    """
    every = readable_rows(paths)
    positions = np.array([i for i, path in enumerate(paths) if path not in every.broken], np.int64)
    return Readable([paths[i] for i in positions], positions, [every.infos[i] for i in positions], every.broken)


def readable_rows(paths: Sequence[Path]) -> Readable:
    """Look at all videos, and keep the place of those that cannot be decoded: they are black.

    Raises:
        MissingExtra: PyAV is not installed.
    """
    results = scan_videos(paths)
    broken = {path: result for path, result in zip(paths, results, strict=True) if isinstance(result, str)}
    infos = [VideoInfo(1, 0, 0) if isinstance(result, str) else result for result in results]
    return Readable(list(paths), np.arange(len(paths)), infos, broken)


def check_broken(videos: Iterable[Readable], context: ReadContext) -> None:
    """Check that no video, or with `on_broken='skip'` few videos of each split, cannot be decoded.

    Raises:
        DataError: Names the first one, and has a message for each in `broken`.
    """
    parts = list(videos)
    messages = [message for part in parts for message in part.broken.values()]
    sizes = [len({*part.paths, *part.broken}) for part in parts]
    worst = max((len(part.broken) / max(1, size) for part, size in zip(parts, sizes, strict=True)), default=0)
    if not messages or (context.on_broken == "skip" and worst <= context.max_broken):
        return
    total = sum(sizes)
    if context.on_broken == "skip":
        text = f"broken videos: {len(messages)} of {total}, more than the {context.max_broken:.0%} that may be skipped"
        error = DataError(f"{text}. The first: {messages[0]}", cli_hint="`petune data check` lists them all")
    else:
        text = f"{messages[0]}. Repair or remove it, or skip up to 1 % of the videos with on_broken='skip'"
        error = DataError(text, cli_hint="The flag is --set on_broken=skip")
    error.broken = tuple(messages)
    raise error


def read_clips(
    videos: Readable,
    sampling: Sampling,
    context: ReadContext,
    *,
    random: bool = True,
    views: Views = ONE_VIEW,
    rows: NDArray[np.int64] | None = None,
) -> Clips:
    """Return the clips of videos, decoded now or by an earlier run, or each time they are read.

    Args:
        videos: Their files.
        sampling: Which frames make a clip.
        context: Side at which frames will be used, and the size of the cache.
        random: Store what training draws from; else what tests need.
        views: In tests.
        rows: The videos whose frames are stored; None stores those of all.

    Raises:
        DataError: A file changed since it was looked at.
    """
    counts = np.array([info.frames for info in videos.infos], np.int64)
    side = stored_side(context.image_size, views)
    crops = crop_shares(views)
    paths = videos.paths

    def read(row: int, numbers: Frames) -> NDArray[np.uint8]:
        if paths[row] in videos.broken:
            return np.zeros((len(crops), len(numbers), side, side, 3), np.uint8)
        return read_frames(paths[row], numbers, side, crops)

    stored_rows = None if rows is None else np.isin(np.arange(len(paths)), rows)
    clips = Clips(counts, sampling, side, read, None, random, views, stored_rows)
    key = {
        "videos": FORMAT,
        "files": [[str(path.resolve()), *size_and_time(path)] for path in paths],
        "side": side,
        "sampling": asdict(sampling),
        "random": random,
        "views": asdict(views),
        "rows": None if rows is None else np.unique(rows).tolist(),
        "counts": counts.tolist(),  # of black videos, until they can be decoded
    }
    stored = stored_split(key)
    if stored is None:
        if int(clips.offsets[-1]) * side * side * 3 > room_in_cache(context.cache_gb):
            return clips
        stored = cached_split(key, _filled(clips))
    return replace(clips, frames=np.asarray(stored.images))


def crop_shares(views: Views) -> tuple[float, ...]:
    """Return where squares are cut from frames; see `petune.data.video.decode.CENTER`."""
    return THREE_CROPS if views.crops == 3 else CENTER


def stored_side(image_size: int, views: Views = ONE_VIEW) -> int:
    """Return the side of stored frames: with a margin, unless three crops already cover the whole frame."""
    return image_size if views.crops > 1 else math.ceil(image_size / CROP)


def stored_share(views: Views = ONE_VIEW) -> float:
    """Return the share of the side of a stored frame that the model sees."""
    return 1.0 if views.crops > 1 else CROP


def short_note(videos: Sequence[Readable], sampling: Sampling) -> str:
    """Name the videos that are shorter than a clip; empty if there are none."""
    needed = (sampling.frames - 1) * sampling.stride + 1
    short = [
        (path, info.frames)
        for part in videos
        for path, info in zip(part.paths, part.infos, strict=True)
        if info.frames < needed and path not in part.broken
    ]
    if not short:
        return ""
    path, count = short[0]
    which = "frames are repeated evenly" if sampling.kind == "uniform" else "the last frame is repeated"
    return (
        f"{plural(len(short), 'video')} of less than {plural(needed, 'frame')}, where {which}, such as {path.name} "
        f"with {count}"
    )


def _filled(clips: Clips) -> Callable[[Allocate], tuple[NDArray[np.int64], NDArray[np.int64]]]:
    def decode(allocate: Allocate) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        total = int(clips.offsets[-1])
        out = allocate(total, clips.side)

        def fill(row: int) -> None:
            if clips.offsets[row] == clips.offsets[row + 1]:
                return
            frames_VKSSC = clips.read(row, clips.stored(row))
            out[clips.offsets[row] : clips.offsets[row + 1]] = frames_VKSSC.reshape(-1, *out.shape[1:])

        with image_workers(num_threads()) as workers:
            for _ in workers.pool.map(fill, range(len(clips))):
                pass
        return np.zeros(total, np.int64), np.arange(total)

    return decode
