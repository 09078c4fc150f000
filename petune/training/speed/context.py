"""The inputs of a speed-up, and the forward that it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from petune.sites.undisturbed import undisturbed
from petune.training.config import NumberFormat
from petune.training.events import Event, Note
from petune.training.job import TrainJob
from petune.training.precision import autocast
from petune.training.stop import StopFlag

Logits = Callable[[Tensor], Tensor]
SAMPLE_IMAGES = 2


@dataclass(frozen=True)
class StepContext:
    """Inputs of the speed-ups of one training.

    Attributes:
        job: What trains, on which images, and how.
        precision: Number format of the forward passes.
        epochs_left: Epochs that are still to be trained.
        num_processes: Processes that train together.
        sharded: Whether the frozen blocks are spread over the processes.
        stop: Checked during long preparations.
        on_event: Receives notes.
        choose_micro_batch: Returns how many images go through the model at once. Called when weights have their final
            number format and checkpointing is on, because both decide what fits.
    """

    job: TrainJob
    precision: NumberFormat
    epochs_left: int
    num_processes: int
    sharded: bool
    stop: StopFlag
    on_event: Callable[[Event], None]
    choose_micro_batch: Callable[[], int]

    @property
    def model(self) -> nn.Module:
        """The model that trains."""
        return self.job.attachment.model

    def note(self, text: str) -> None:
        """Tell the user something."""
        self.on_event(Note(text))

    def autocast(self) -> torch.autocast:
        """Return the context of forward passes."""
        return autocast(self.job.device, self.precision)

    def images(self, count: int) -> Tensor:
        """Return the first `count` training images as the model sees them without augmentation, (count, 3, H, W)."""
        split, preprocess = self.job.dataset.train, self.job.preprocess
        positions = np.arange(count) % len(split)
        return preprocess.normalize(preprocess.pixels(split, positions, self.job.device))

    def sample_logits(self) -> Tensor:
        """Return the logits of `SAMPLE_IMAGES` images in eval mode; a speed-up that changes their bits is not used."""
        with undisturbed(self.model), torch.no_grad(), self.autocast():
            logits: Tensor = self.model(self.images(SAMPLE_IMAGES))
        return logits


@dataclass(frozen=True)
class Forward:
    """Forward passes for training and evaluation.

    Attributes:
        images: From images (B, 3, H, W) to logits (B, C), for training.
        cached: By the name of a split whose features are cached: from positions in the split (B,) to logits (B, C).
    """

    images: Logits
    cached: Mapping[str, Logits] = field(default_factory=dict)

    @property
    def trains_on_positions(self) -> bool:
        """True if training batches need only image positions."""
        return "train" in self.cached

    @property
    def train(self) -> Logits:
        """Logits of what a training batch holds: positions where they are cached, else images."""
        return self.cached.get("train", self.images)
