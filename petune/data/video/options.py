"""Options of datasets of videos: which frames make a clip."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from petune.data.reader import ReadContext, ReaderConfig
from petune.data.video.clips import Views
from petune.data.video.sampling import Sampling, SamplingKind

STRIDE = 4
"""Default of dense sampling: 16 frames, 4 apart, are 2 seconds, as in papers on Kinetics."""


class ClipOptions(ReaderConfig):
    """The frames of a clip.

    Attributes:
        frames: Frames of a clip; if not given, as many as the backbone takes, and 8 for a model of images.
        sampling: `uniform` takes a frame of each part of the video; `dense` frames in a row, `stride` apart.
        stride: Of dense sampling, in frames; 4 if not given.
        test_clips: Clips of a video in tests, whose predictions are averaged.
        test_crops: Crops of a frame in tests: 3 are left, center and right.
    """

    frames: int | None = Field(None, ge=1, le=1024)
    sampling: SamplingKind = "uniform"
    stride: int | None = Field(None, ge=1)
    test_clips: int = Field(1, ge=1)
    test_crops: Literal[1, 3] = 1

    @model_validator(mode="after")
    def _check_stride(self) -> ClipOptions:
        if self.stride is not None and self.sampling != "dense":
            raise ValueError("stride is only for sampling=dense")
        return self

    def sampling_of(self, context: ReadContext) -> Sampling:
        """Return which frames make a clip."""
        stride = (self.stride or STRIDE) if self.sampling == "dense" else 1
        return Sampling(self.sampling, self.frames or context.frames, stride)

    @property
    def views(self) -> Views:
        """Clips and crops of a video in tests."""
        return Views(self.test_clips, self.test_crops)
