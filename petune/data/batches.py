"""From a split to normalised batches on a device.

Legend: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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
        image_size: Side of the square image, in pixels.
        mean, std: Of the channels, for pixels in [0, 1].
    """

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def pixels(self, split: Split, positions: NDArray[np.int64], device: torch.device) -> Tensor:
        """Images in 0..255 at `image_size`, float32 (B, 3, H, W), less the margin they were stored with."""
        raw = torch.from_numpy(np.ascontiguousarray(split.images[split.rows[positions]]))
        x_BCHW = to_device(raw, device).permute(0, 3, 1, 2).float()
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
        """One image without content, float32 (1, 3, H, W)."""
        return torch.zeros(1, 3, self.image_size, self.image_size, device=device)

    def normalize(self, x_BCHW: Tensor) -> Tensor:
        """From 0..255 to zero mean and unit variance by the backbone's own statistics."""
        statistics = to_device(torch.tensor([self.mean, self.std]), x_BCHW.device).view(2, 3, 1, 1) * 255
        return (x_BCHW - statistics[0]) / statistics[1]


@dataclass(frozen=True)
class Batch:
    """Normalised images (B, 3, H, W), labels (B,), and where in the split each image lies."""

    x_BCHW: Tensor
    y_B: Tensor
    positions: NDArray[np.int64]


class TrainBatches:
    """Shuffled, augmented batches; any batch of any epoch can be asked for, so a resume repeats nothing.

    Attributes:
        positions_only: Give the places of the images in the split, int64 (B,), in place of the images.
    """

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
        self.positions_only = False

    def __len__(self) -> int:
        return len(self.split) // self.batch_size  # the ragged last batch is dropped

    def note(self) -> str:
        """What to know where more than a tenth of the images is left out of an epoch; empty else."""
        images, left = len(self.split), len(self.split) % self.batch_size
        if left <= images / 10:
            return ""
        sizes = range(self.batch_size - 1, self.batch_size // 2, -1)
        better = next((size for size in sizes if images % size <= images / 10), None)
        advice = f"; --set train.batch_size={better} uses {images - images % better:,}" if better else ""
        return (
            f"each epoch trains on {images - left:,} of {images:,} images, others each time, since {left:,} fill "
            f"no batch of {self.batch_size}{advice}"
        )

    def epoch(self, epoch: int, start: int = 0, part: slice = slice(None)) -> Iterator[Batch]:
        """The batches of one epoch from batch `start` on, and of each batch only the images of `part`.

        For a GPU each is made while the one before is in use.
        """
        batches = self._epoch(epoch, start, part)
        return ahead(batches, self.device) if self.device.type == "cuda" else batches

    def _epoch(self, epoch: int, start: int, part: slice) -> Iterator[Batch]:
        positions = order(self.seed, epoch, len(self.split))
        table = draws(self.seed, epoch, len(self.split))
        for step in range(start, len(self)):
            chosen = positions[step * self.batch_size : (step + 1) * self.batch_size][part]
            x = torch.from_numpy(chosen) if self.positions_only else self._images(chosen, table)
            yield Batch(x, _labels(self.split, chosen, self.device), chosen)

    def _images(self, chosen: NDArray[np.int64], table: NDArray[np.float32]) -> Tensor:
        u = to_device(torch.from_numpy(table[chosen]), self.device)
        x_BCHW = augment(self.preprocess.pixels(self.split, chosen, self.device), self.preset, u)
        return self.preprocess.normalize(x_BCHW)


def eval_batches(
    split: Split, preprocess: Preprocess, batch_size: int, device: torch.device, *, positions_only: bool = False
) -> Iterator[Batch]:
    """All images of a split in order, the ragged last batch included; or only their places, as in TrainBatches."""
    for start in range(0, len(split), batch_size):
        chosen = np.arange(start, min(start + batch_size, len(split)))
        if positions_only:
            x = torch.from_numpy(chosen)
        else:
            x = preprocess.normalize(preprocess.pixels(split, chosen, device))
        yield Batch(x, _labels(split, chosen, device), chosen)


def _labels(split: Split, positions: NDArray[np.int64], device: torch.device) -> Tensor:
    return to_device(torch.from_numpy(split.labels[positions]), device)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """`x` on the device; to a GPU from pinned memory, so that nobody waits."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches, each made by another thread while the one before it is in use."""

    def begin() -> None:
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # a thread starts on the first GPU

    with ThreadPoolExecutor(1, initializer=begin) as pool:
        following = pool.submit(next, batches, None)
        while (batch := following.result()) is not None:
            following = pool.submit(next, batches, None)
            yield batch
