"""Mixup and CutMix by timm, with the randomness of a step taken from (seed, step).

Legend: B batch, C classes or channels, H height, W width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from petune.base.errors import ConfigError
from petune.data.batches import Batch
from petune.training.config import TrainConfig


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """A number for the generators of a step; different for every (seed, step), and for each process of a group."""
    words = [seed, step, rank] if rank else [seed, step]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)


def seed_step(device: torch.device, seed: int, step: int, rank: int = 0) -> None:
    """Put the generators that a step draws from where they stand whatever was drawn before."""
    number = step_seed(seed, step, rank)
    if device.type == "cpu":  # torch.manual_seed tells every accelerator, too, with a stack trace each: 2 ms a step
        torch.default_generator.manual_seed(number)
    else:
        torch.manual_seed(number)


class Mixing:
    """Mixes the images of a batch, or leaves them alone where neither mixup nor cutmix is asked for.

    Args:
        train: `mixup`, `cutmix` and `label_smoothing`, which timm then spreads itself.
        batch_size: As trained with; timm mixes each image with its mirror place, so it must be even.

    Raises:
        ConfigError: An odd batch was to be mixed.
    """

    def __init__(self, train: TrainConfig, num_classes: int, batch_size: int, seed: int) -> None:
        self.seed, self.mixup = seed, None
        self.smoothing = train.label_smoothing
        if not (train.mixup or train.cutmix):
            return
        if batch_size % 2:
            raise ConfigError(f"mixup and cutmix need an even batch size, but it is {batch_size}; change --batch-size")
        from timm.data import Mixup

        self.smoothing = 0.0  # in the targets already
        self.mixup = Mixup(
            mixup_alpha=train.mixup,
            cutmix_alpha=train.cutmix,
            label_smoothing=train.label_smoothing,
            num_classes=num_classes,
        )

    @property
    def needs_whole_batch(self) -> bool:
        """Whether images are mixed with others of their batch."""
        return self.mixup is not None

    def __call__(self, batch: Batch, step: int) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) and their targets: labels (B,), or shares (B, C) where they are mixed."""
        if self.mixup is None:
            return batch.x_BCHW, batch.y_B
        state = np.random.get_state()
        np.random.seed(step_seed(self.seed, step) % 2**32)  # timm draws from numpy's global generator
        try:
            x, target = self.mixup(batch.x_BCHW, batch.y_B)
        finally:
            np.random.set_state(state)
        return x, target
