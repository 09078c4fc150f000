"""Clips by row: the frames of an array, or decoded each time.

Legend: N videos, T frames of a clip, S side in pixels, C channels, M stored frames of all videos, V crops of a frame.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from petune.data.images import num_threads
from petune.data.video.sampling import Frames, Sampling
from petune.data.workers import image_workers

ReadClip = Callable[[int, Frames], NDArray[np.uint8]]
"""From the number of a video and numbers of its frames, sorted, to the frames: uint8 (V, K, S, S, C)."""


@dataclass(frozen=True)
class Views:
    """Clips and crops of a video in tests, whose predictions are averaged.

    Attributes:
        clips: Evenly spread over the video.
        crops: 1 is the center; 3 are left, center and right (or top, center and bottom).
    """

    clips: int = 1
    crops: int = 1

    def __len__(self) -> int:
        return self.clips * self.crops


ONE_VIEW = Views()


@dataclass(frozen=True)
class Clips:
    """Clips by row of the video, uint8; `petune.data.dataset.Images`.

    Attributes:
        counts: int64 (N,), frames of each video.
        sampling: Which of them make a clip.
        side: S.
        read: Decodes frames; called from several threads.
        frames: uint8 (M, S, S, C), the frames of `Sampling.stored` of each video, all of them for each crop; None if
            they do not fit the cache, and are decoded each time.
        random: The stored frames are those that training draws from; else those of tests.
        views: In tests.
        stored_rows: bool (N,), the videos with frames in `frames`, others are decoded each time; None if all have.
    """

    counts: NDArray[np.int64]
    sampling: Sampling
    side: int
    read: ReadClip
    frames: NDArray[np.uint8] | None = field(repr=False)
    random: bool = True
    views: Views = ONE_VIEW
    stored_rows: NDArray[np.bool_] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, T, S, S, C)."""
        return (len(self.counts), self.sampling.frames, self.side, self.side, 3)

    @property
    def dtype(self) -> np.dtype[Any]:
        """uint8."""
        return np.dtype(np.uint8)

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, rows: Any) -> NDArray[np.uint8]:
        """Return the clips of these rows, or of one row, that tests use: the first of several views."""
        chosen = np.arange(len(self))[rows]
        if chosen.ndim == 0:
            return self._clip(int(chosen), self._fixed(int(chosen), 0), 0)
        return self.view(chosen, 0)

    def view(self, rows: NDArray[np.int64], number: int) -> NDArray[np.uint8]:
        """Return a view of each of these rows, uint8 (B, T, S, S, C).

        Args:
            rows: Of the videos.
            number: From 0 to `len(views)` - 1.
        """
        clip, crop = divmod(number, self.views.crops)
        return self._map(rows, [self._fixed(row, clip) for row in rows.tolist()], crop)

    def draw(self, rows: NDArray[np.int64], seeds: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return random clips, uint8 (B, T, S, S, C).

        Args:
            rows: Of the videos.
            seeds: One for each; a clip depends on nothing else.
        """
        chosen = [
            self.sampling.draw(int(self.counts[row]), np.random.Generator(np.random.Philox(key=seed)))
            for row, seed in zip(rows.tolist(), seeds.tolist(), strict=True)
        ]
        return self._map(rows, chosen, 0)

    def stored(self, row: int) -> Frames:
        """Return the numbers of the frames of a video that are in `frames`."""
        return self.sampling.stored(int(self.counts[row]), random=self.random, clips=self.views.clips)

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """Positions in `frames` of the first frame of each video, and the end of the last, int64 (N + 1,)."""
        sizes = dict.fromkeys(self.counts.tolist(), 0)
        for count in sizes:
            sizes[count] = len(self.sampling.stored(count, random=self.random, clips=self.views.clips))
        numbers = np.array([sizes[count] for count in self.counts.tolist()], np.int64) * self.views.crops
        if self.stored_rows is not None:
            numbers *= self.stored_rows
        return np.concatenate([[0], np.cumsum(numbers)])

    def _fixed(self, row: int, clip: int) -> Frames:
        return self.sampling.fixed(int(self.counts[row]), clip, self.views.clips)

    def _map(self, rows: NDArray[np.int64], numbers: Sequence[Frames], crop: int) -> NDArray[np.uint8]:
        out = np.empty((len(rows), *self.shape[1:]), np.uint8)
        if self.frames is not None or len(rows) == 1:  # a thread that prepares one clip starts no others
            for position, row in enumerate(rows.tolist()):
                out[position] = self._clip(row, numbers[position], crop)
            return out
        with image_workers(num_threads()) as workers:
            clips = workers.pool.map(self._clip, rows.tolist(), numbers, [crop] * len(rows))
            for position, clip in enumerate(clips):
                out[position] = clip
        return out

    def _clip(self, row: int, numbers: Frames, crop: int) -> NDArray[np.uint8]:
        if self.frames is None or self.offsets[row] == self.offsets[row + 1]:
            different, positions = np.unique(numbers, return_inverse=True)
            return np.asarray(self.read(row, different)[crop][positions])
        stored = self.stored(row)
        first = self.offsets[row] + crop * len(stored)
        return np.asarray(self.frames[first + np.searchsorted(stored, numbers)])


def frame_grid(clips_BTHWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return four frames of each clip, from first to last in reading order, as one image (B, 2H, 2W, C)."""
    frames = _four(clips_BTHWC)
    rows = [np.concatenate([frames[:, i], frames[:, i + 1]], axis=2) for i in (0, 2)]
    return np.concatenate(rows, axis=1)


def frame_column(clips_BTHWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the same four frames below each other, (B, 4H, W, C): a mirrored clip gives the mirror image."""
    return np.concatenate(list(_four(clips_BTHWC).swapaxes(0, 1)), axis=1)


def _four(clips_BTHWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return clips_BTHWC[:, np.rint(np.linspace(0, clips_BTHWC.shape[1] - 1, 4)).astype(np.int64)]
