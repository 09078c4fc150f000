"""Mixup and CutMix, by the task, with random numbers derived from (seed, step).

Legend: B batch, C classes or channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from petune.base.errors import ConfigError
from petune.data.batches import Batch, whole_batch
from petune.training.config import TrainConfig
from petune.training.randomness import step_seed
from petune.training.task import Task

if TYPE_CHECKING:
    from petune.training.task import Mix


class BatchMixer:
    """Mixes the images of a batch, or passes them on if neither mixup nor cutmix is on.

    Args:
        config: `mixup`, `cutmix` and `label_smoothing`.
        task: Mixes images and targets.
        batch_size: Images of the largest batch. timm mixes each image with its mirror position, so it must be even.
        seed: The run's seed.
        part: Returns the images of a batch of that size that this process trains on.

    Attributes:
        reads: Returns the images of a batch that have to be read: all of them if they are mixed with each other.
        label_smoothing: What is left for the loss to apply; mixed targets are smooth already.

    Raises:
        ConfigError: An odd batch size with mixup or cutmix, or a task whose targets cannot be mixed.
    """

    def __init__(
        self, config: TrainConfig, task: Task[Any], batch_size: int, seed: int, part: Callable[[int], slice]
    ) -> None:
        self.seed = seed
        self.part = part
        self.reads = part
        self.label_smoothing = config.label_smoothing
        self._mix: Mix | None = None
        if not config.mixes:
            return
        check_even(batch_size)
        self.reads = whole_batch
        self.label_smoothing = 0.0
        self._mix = task.mix(config.mixup, config.cutmix, config.label_smoothing)

    def __call__(self, batch: Batch, step: int) -> tuple[Tensor, Tensor]:
        """Return this process's images (B, 3, H, W), or clips, and targets, as the dataset has them or mixed."""
        if self._mix is None:
            return batch.x_BCHW, batch.y_B
        state = np.random.get_state()
        np.random.seed(step_seed(self.seed, step) % 2**32)  # timm draws from numpy's global generator
        try:
            x_BCHW, target_BC = self._mix(_frames_as_channels(batch.x_BCHW), batch.y_B)
        finally:
            np.random.set_state(state)
        part = self.part(batch.num_images)
        return x_BCHW.view(-1, *batch.x_BCHW.shape[1:])[part], target_BC[part]


def _frames_as_channels(x: Tensor) -> Tensor:
    """Return clips (B, T, C, H, W) as (B, T * C, H, W), so that all frames of two clips are mixed alike."""
    return x.flatten(1, 2) if x.ndim == 5 else x


def check_even(batch_size: int) -> None:
    """Check that the images of a batch can be mixed in pairs.

    Raises:
        ConfigError: The batch size is odd.
    """
    if batch_size % 2:
        raise ConfigError(
            f"mixup and cutmix need an even batch size, but it is {batch_size}. Use another train.batch_size",
            cli_hint="Set it with --batch-size",
        )
