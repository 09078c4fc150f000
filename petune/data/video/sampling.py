"""Choose the frames of a clip: at random for training, always the same ones for tests.

Legend: F frames of the video, T frames of the clip.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Frames = NDArray[np.int64]
SamplingKind = Literal["uniform", "dense"]
CHOICES = 5
"""Frames of a segment, or starts of a clip, that training draws from where a video has more: those are stored. Odd, so
that the middle is one of them."""


@dataclass(frozen=True)
class Sampling:
    """Rule for the frames of a clip.

    Attributes:
        kind: `uniform` divides the video into T segments and takes a frame of each (TSN, arXiv:1608.00859): a random
            one in training, the middle one in tests. `dense` takes T frames, `stride` apart, from a random start in
            training and from the middle of the video in tests.
        frames: T.
        stride: Of dense sampling, in frames.
    """

    kind: SamplingKind
    frames: int
    stride: int = 1

    def __str__(self) -> str:
        stride = f",stride={self.stride}" if self.kind == "dense" else ""
        return f"frames={self.frames},sampling={self.kind}{stride}"

    def draw(self, count: int, generator: np.random.Generator) -> Frames:
        """Return the frames of a random clip, int64 (T,).

        Args:
            count: F. If it is smaller than a clip, uniform sampling repeats frames evenly, dense sampling the last one.
            generator: Decides.
        """
        if self.kind == "uniform":
            start_T, length_T = self._segments(count)
            choice_T = (generator.random(self.frames) * np.minimum(length_T, CHOICES)).astype(np.int64)
            return start_T + np.where(length_T <= CHOICES, choice_T, _middle(length_T, choice_T, CHOICES))
        return self._from(int(generator.choice(self._starts(count))), count)

    def fixed(self, count: int, number: int = 0, clips: int = 1) -> Frames:
        """Return the frames of a clip for tests, int64 (T,): the middle of each segment, or of the video.

        Args:
            count: F.
            number: Which clip, from 0.
            clips: Clips of a video, evenly spread over it.
        """
        if self.kind == "uniform":
            start_T, length_T = self._segments(count)
            return start_T + _middle(length_T, np.int64(number), clips)
        last = self._last_start(count)
        return self._from(last // 2 if clips == 1 else round(number * last / (clips - 1)), count)

    def stored(self, count: int, *, random: bool, clips: int = 1) -> Frames:
        """Return all frames that a clip can have, in order, at most 5 T (or `clips` times T).

        Args:
            count: F.
            random: Include those that `draw` chooses from.
            clips: Clips of a video in tests.
        """
        wanted = [self.fixed(count, number, clips) for number in range(clips)]
        if random and self.kind == "uniform":
            start_T, length_T = self._segments(count)
            for choice in range(CHOICES):
                inside = np.where(length_T <= CHOICES, np.minimum(choice, length_T - 1), _middle(length_T, choice))
                wanted.append(start_T + inside)
        elif random:
            wanted += [self._from(start, count) for start in self._starts(count).tolist()]
        return np.unique(np.concatenate(wanted))

    def _segments(self, count: int) -> tuple[Frames, Frames]:
        edges = np.arange(self.frames + 1) * count // self.frames
        return edges[:-1], np.maximum(np.diff(edges), 1)

    def _last_start(self, count: int) -> int:
        return max(0, count - (self.frames - 1) * self.stride - 1)

    def _starts(self, count: int) -> Frames:
        """Return the starts of clips to draw from: a stride apart, or a few if all are too many to store."""
        last = self._last_start(count)
        middle = last // 2
        starts = np.arange(middle % self.stride, last + 1, self.stride)
        if len(starts) + self.frames - 1 <= CHOICES * self.frames:
            return starts
        chosen = np.rint(np.linspace(0, len(starts) - 1, CHOICES)).astype(np.int64)
        chosen[CHOICES // 2] = middle // self.stride
        return starts[chosen]

    def _from(self, start: int, count: int) -> Frames:
        return np.minimum(start + np.arange(self.frames) * self.stride, count - 1)


def _middle(length: Frames, number: Frames | np.int64 | int, parts: int = CHOICES) -> Frames:
    """Return the middle of a part of each segment, from the start of the segment."""
    return (2 * number + 1) * length // (2 * parts)
