"""From a split to normalised batches on a device.

Legend: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from petune.data.augment import augment, draws, order
from petune.data.dataset import Split


@dataclass(frozen=True)
class Preprocess:
    """What the backbone wants to see.

    Attributes:
        image_size: Side of the square picture, in pixels.
        mean, std: Of the channels, for pixels in [0, 1].
    """

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def pixels(self, split: Split, positions: NDArray[np.int64], device: torch.device) -> Tensor:
        """Pictures in 0..255 at `image_size`, float32 (B, 3, H, W), less the margin they were stored with."""
        raw = torch.from_numpy(np.ascontiguousarray(split.images[split.rows[positions]]))
        if device.type == "cuda":
            raw = raw.pin_memory()
        x_BCHW = raw.to(device, non_blocking=True).permute(0, 3, 1, 2).float()
        if split.crop < 1:
            have = x_BCHW.shape[-1]
            kept = math.floor(have * split.crop)
            top = (have - kept) // 2
            x_BCHW = x_BCHW[..., top : top + kept, top : top + kept]
        if x_BCHW.shape[-1] != self.image_size:
            size = (self.image_size, self.image_size)
            x_BCHW = F.interpolate(x_BCHW, size, mode="bicubic", antialias=True).clamp(0, 255)
        return x_BCHW

    def blank(self, device: torch.device) -> Tensor:
        """One picture without content, float32 (1, 3, H, W)."""
        return torch.zeros(1, 3, self.image_size, self.image_size, device=device)

    def normalise(self, x_BCHW: Tensor) -> Tensor:
        """From 0..255 to zero mean and unit variance by the backbone's own statistics."""
        statistics = torch.tensor([self.mean, self.std], device=x_BCHW.device).view(2, 3, 1, 1) * 255
        return (x_BCHW - statistics[0]) / statistics[1]


@dataclass(frozen=True)
class Batch:
    """Normalised pictures (B, 3, H, W), labels (B,), and where in the split each picture lies."""

    x_BCHW: Tensor
    y_B: Tensor
    positions: NDArray[np.int64]


class TrainBatches:
    """Shuffled, augmented batches; any batch of any epoch can be asked for, so a resume repeats nothing."""

    def __init__(
        self,
        split: Split,
        preprocess: Preprocess,
        preset: str,
        batch_size: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self.split, self.preprocess, self.preset = split, preprocess, preset
        self.batch_size, self.seed, self.device = min(batch_size, len(split)), seed, device

    def __len__(self) -> int:
        return len(self.split) // self.batch_size  # the ragged last batch is dropped

    def epoch(self, epoch: int, start: int = 0, part: slice = slice(None)) -> Iterator[Batch]:
        """The batches of one epoch from batch `start` on, and of each batch only the pictures of `part`."""
        positions = order(self.seed, epoch, len(self.split))
        table = draws(self.seed, epoch, len(self.split))
        for step in range(start, len(self)):
            chosen = positions[step * self.batch_size : (step + 1) * self.batch_size][part]
            u = torch.from_numpy(table[chosen]).to(self.device)
            x = augment(self.preprocess.pixels(self.split, chosen, self.device), self.preset, u)
            yield Batch(self.preprocess.normalise(x), _labels(self.split, chosen, self.device), chosen)


def eval_batches(split: Split, preprocess: Preprocess, batch_size: int, device: torch.device) -> Iterator[Batch]:
    """All pictures of a split in order, the ragged last batch included."""
    for start in range(0, len(split), batch_size):
        chosen = np.arange(start, min(start + batch_size, len(split)))
        x = preprocess.normalise(preprocess.pixels(split, chosen, device))
        yield Batch(x, _labels(split, chosen, device), chosen)


def _labels(split: Split, positions: NDArray[np.int64], device: torch.device) -> Tensor:
    return torch.from_numpy(split.labels[positions]).to(device)
