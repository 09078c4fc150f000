"""Read videos for a trained model, exactly as in its tests.

Legend: B videos, V views of each, T frames of a clip, S side of a stored frame in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from petune.base.errors import DataError, PetuneError
from petune.data.find_images import VIDEOS
from petune.data.images import num_threads, supported_suffixes
from petune.data.squares import center_pixels
from petune.data.video.clips import ONE_VIEW, Views
from petune.data.video.decode import read_frames, read_info
from petune.data.video.sampling import Frames, Sampling
from petune.data.video.store import crop_shares
from petune.data.workers import image_workers


@dataclass(frozen=True)
class ClipFiles:
    """The rules by which videos become clips.

    Attributes:
        sampling: Which frames are read.
        side: S.
        views: Clips and crops of a video, whose outputs are averaged.
    """

    sampling: Sampling
    side: int
    views: Views = ONE_VIEW

    def read(self, videos: Sequence[Any]) -> tuple[NDArray[np.uint8], dict[int, str]]:
        """Read videos, one thread per core.

        Args:
            videos: Files, or uint8 arrays (frames, height, width, 3).

        Returns:
            uint8 (B * V, T, S, S, 3), all views of the first video, then those of the next; and the reason for each
            video that cannot be read, which is black.
        """
        views = len(self.views)
        out = np.zeros((len(videos), views, self.sampling.frames, self.side, self.side, 3), np.uint8)
        errors: dict[int, str] = {}

        def read(number: int) -> None:
            try:
                out[number] = self._views_of(videos[number])
            except (PetuneError, ValueError, MemoryError) as error:
                errors[number] = str(error)

        with image_workers(num_threads()) as workers:
            for _ in workers.pool.map(read, range(len(videos))):
                pass
        return out.reshape(-1, *out.shape[2:]), dict(sorted(errors.items()))

    def _views_of(self, video: Any) -> NDArray[np.uint8]:
        """Return all views of a video, (V, T, S, S, 3)."""
        if isinstance(video, DataError):
            raise video
        if isinstance(video, Path):
            if video.suffix.lower() in supported_suffixes() - VIDEOS.suffixes():
                raise DataError(f"{video}: an image, and the model takes videos")
            return self._of_file(video)
        if not isinstance(video, np.ndarray) or video.ndim != 4 or video.dtype != np.uint8 or video.shape[3] != 3:
            given = f"{video.shape} of {video.dtype}" if isinstance(video, np.ndarray) else type(video).__name__
            raise ValueError(f"not a video: {given}. Give a file, or uint8 (frames, height, width, 3)")
        if 0 in video.shape[1:3]:
            raise ValueError(f"not a video: {video.shape} has no pixels")
        if not len(video):
            raise ValueError("not a video: it has no frames")
        return self._of_array(video)

    def _of_file(self, path: Path) -> NDArray[np.uint8]:
        clips_KT = self._clips_of(read_info(path).frames)
        needed = np.unique(np.concatenate(clips_KT))
        frames_VKSS3 = read_frames(path, needed, self.side, crop_shares(self.views))
        return np.stack([frames[np.searchsorted(needed, clip)] for clip in clips_KT for frames in frames_VKSS3])

    def _of_array(self, frames_FHW3: NDArray[np.uint8]) -> NDArray[np.uint8]:
        views = [(clip, share) for clip in self._clips_of(len(frames_FHW3)) for share in crop_shares(self.views)]
        return np.stack(
            [
                np.stack([center_pixels(frame, self.side, share) for frame in np.array(frames_FHW3[clip])])
                for clip, share in views
            ]
        )

    def _clips_of(self, count: int) -> list[Frames]:
        """Return the numbers of the frames of each clip of a video with `count` frames."""
        return [self.sampling.fixed(count, number, self.views.clips) for number in range(self.views.clips)]
