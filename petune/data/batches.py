"""Turn a split into normalized batches on a device.

Legend: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from petune.base.text import plural
from petune.data.augment import augment, epoch_order, random_draws
from petune.data.dataset import Split

GRAY_WEIGHTS = (0.299, 0.587, 0.114)
"""Shares of red, green and blue in gray (ITU-R BT.601)."""
MAX_LEFT_OUT = 0.05
"""Share of the training images that an epoch may leave out so that all its batches are full."""


@dataclass(frozen=True)
class Preprocess:
    """Size and statistics of the images that the backbone expects.

    Attributes:
        image_size: Side of the square image, in pixels.
        mean, std: Mean and standard deviation per channel, for pixels in [0, 1]. A single channel is gray.
    """

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def pixels(self, split: Split, positions: NDArray[np.int64], device: torch.device) -> Tensor:
        """Return images in 0..255 at `image_size`, float32 (B, 3, H, W), without the margin they were stored with."""
        raw = torch.from_numpy(np.ascontiguousarray(split.images[split.rows[positions]]))
        x_BCHW = to_device(raw, device).permute(0, 3, 1, 2).float()
        if split.crop < 1:
            x_BCHW = center_crop(x_BCHW, split.crop)
        if x_BCHW.shape[-1] != self.image_size:
            size = (self.image_size, self.image_size)
            x_BCHW = F.interpolate(x_BCHW, size, mode="bicubic", antialias=True).clamp(0, 255)
        return x_BCHW

    def blank(self, device: torch.device) -> Tensor:
        """Return one black image, float32 (1, C, H, W)."""
        return torch.zeros(1, len(self.mean), self.image_size, self.image_size, device=device)

    def normalize(self, x_BCHW: Tensor) -> Tensor:
        """Normalize RGB images in 0..255 by mean and standard deviation, as gray ones if there is a single mean."""
        if len(self.mean) == 1:
            x_BCHW = to_gray(x_BCHW)
        statistics = to_device(torch.tensor([self.mean, self.std]), x_BCHW.device).view(2, -1, 1, 1) * 255
        return (x_BCHW - statistics[0]) / statistics[1]


def to_gray(x_BCHW: Tensor) -> Tensor:
    """Return the luma of RGB images, (B, 1, H, W), by the weights that Pillow uses too."""
    weights_C = torch.tensor(GRAY_WEIGHTS, device=x_BCHW.device).view(1, 3, 1, 1)
    return (x_BCHW * weights_C).sum(1, keepdim=True)


def center_crop(x_BCHW: Tensor, share: float) -> Tensor:
    """Keep the center of square images, `share` of the side."""
    stored = x_BCHW.shape[-1]
    side = math.floor(stored * share)
    start = (stored - side) // 2
    return x_BCHW[..., start : start + side, start : start + side]


@dataclass(frozen=True)
class Batch:
    """Images of one step, or the part of them that one process takes.

    Attributes:
        x_BCHW: Normalized images (B, 3, H, W).
        y_B: Targets, one per image: (B,), (B, C), (B, K) or (B, S, S); see `petune.data.target.Target`.
        positions: Position of each image in the split.
        num_images: Images of the whole batch, of all processes together.
    """

    x_BCHW: Tensor
    y_B: Tensor
    positions: NDArray[np.int64]
    num_images: int


def batch_bounds(num_images: int, batch_size: int, *, even: bool = False) -> NDArray[np.int64]:
    """Divide an epoch into batches.

    Batches are full if they leave out less than `MAX_LEFT_OUT` of the images. Otherwise an epoch has as many batches
    as it takes to use all images, of nearly equal sizes: a small last batch would move the parameters as far as the
    others, with a noisier gradient.

    Args:
        num_images: Size of the training split.
        batch_size: Images per batch at most.
        even: Give every batch an even number of images, which leaves out one image of an odd number.

    Returns:
        Where each batch starts in the epoch's order, and where the last one ends; int64 (batches + 1,).
    """
    usable = num_images - num_images % 2 if even else num_images
    size = min(batch_size, usable)
    if num_images - usable // size * size < MAX_LEFT_OUT * num_images:
        return np.arange(0, usable + 1, size)
    unit = 2 if even or size == 2 else 1  # BatchNorm cannot train on a single image
    units = usable // unit
    num_batches = math.ceil(units / (size // unit))
    return np.arange(num_batches + 1) * units // num_batches * unit


def whole_batch(num_images: int) -> slice:
    """Return all images of a batch, as the part of a single process."""
    return slice(0, num_images)


class TrainBatches:
    """Shuffled, augmented batches. Any batch of any epoch can be requested, so a resume repeats nothing.

    Args:
        split: The training images.
        preprocess: Size and statistics that the backbone expects.
        preset: Name of the augmentation.
        batch_size: Images per batch; see `batch_bounds`.
        seed: Seed of order and augmentation.
        device: Device of the batches.
        even: See `batch_bounds`.

    Attributes:
        batch_size: Images of the largest batch.
    """

    def __init__(
        self,
        split: Split,
        preprocess: Preprocess,
        preset: str,
        batch_size: int,
        seed: int,
        device: torch.device,
        *,
        even: bool = False,
    ) -> None:
        self.split = split
        self.preprocess = preprocess
        self.preset = preset
        self.bounds = batch_bounds(len(split), batch_size, even=even)
        self.sizes = np.diff(self.bounds)
        self.full_size = min(batch_size, len(split))
        self.batch_size = int(self.sizes.max())
        self.seed = seed
        self.device = device

    def __len__(self) -> int:
        return len(self.sizes)

    def num_images(self, steps: int) -> int:
        """Return how many images the first `steps` batches of a training have."""
        epochs, batches = divmod(steps, len(self))
        return int(epochs * self.bounds[-1] + self.bounds[batches])

    def note(self) -> str:
        """Describe batches that are smaller than the batch size; return an empty string if they are full."""
        num_images, full = len(self.split), self.full_size
        if self.sizes.min() == full or len(self) == 1:
            return ""
        sizes = " or ".join(f"{size}" for size in sorted({*self.sizes.tolist()}))
        return (
            f"each epoch has {plural(len(self), 'batch', 'batches')} of {sizes} images, because full ones of {full} "
            f"would leave out {num_images % full:,} of {num_images:,}"
        )

    def epoch(
        self,
        epoch: int,
        start: int = 0,
        part: Callable[[int], slice] = whole_batch,
        *,
        positions_only: bool = False,
    ) -> Iterator[Batch]:
        """Yield the batches of one epoch.

        On a GPU each batch is prepared while the previous one is in use.

        Args:
            epoch: Number of the epoch, from 0.
            start: First batch to yield.
            part: Returns the images to yield of a batch of that size; every process of a distributed run takes its own.
            positions_only: Yield positions of the images in the split, int64 (B,), instead of the images.
        """
        batches = self._epoch(epoch, start, part, positions_only)
        return prefetch(batches, self.device) if self.device.type == "cuda" else batches

    def _epoch(self, epoch: int, start: int, part: Callable[[int], slice], positions_only: bool) -> Iterator[Batch]:
        order = epoch_order(self.seed, epoch, len(self.split))
        draws = random_draws(self.seed, epoch, len(self.split))
        for step in range(start, len(self)):
            size = int(self.sizes[step])
            positions = order[self.bounds[step] : self.bounds[step + 1]][part(size)]
            x = torch.from_numpy(positions) if positions_only else self._images(positions, draws)
            yield Batch(x, _targets(self.split, positions, self.device), positions, size)

    def _images(self, positions: NDArray[np.int64], draws: NDArray[np.float32]) -> Tensor:
        u = to_device(torch.from_numpy(draws[positions]), self.device)
        x_BCHW = augment(self.preprocess.pixels(self.split, positions, self.device), self.preset, u)
        return self.preprocess.normalize(x_BCHW)


def eval_batches(
    split: Split, preprocess: Preprocess, batch_size: int, device: torch.device, *, positions_only: bool = False
) -> Iterator[Batch]:
    """Yield all images of a split in order, including an incomplete last batch.

    Args:
        split: The images.
        preprocess: Size and statistics that the backbone expects.
        batch_size: Images per batch.
        device: Device of the batches.
        positions_only: As in `TrainBatches`.
    """
    for start in range(0, len(split), batch_size):
        positions = np.arange(start, min(start + batch_size, len(split)))
        if positions_only:
            x = torch.from_numpy(positions)
        else:
            x = preprocess.normalize(preprocess.pixels(split, positions, device))
        yield Batch(x, _targets(split, positions, device), positions, len(positions))


def _targets(split: Split, positions: NDArray[np.int64], device: torch.device) -> Tensor:
    return to_device(torch.from_numpy(np.ascontiguousarray(split.targets_at(positions))), device)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Return `x` on the device; copies to a GPU use pinned memory and do not block."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def prefetch(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield the same batches, each prepared by another thread while the previous one is in use."""

    def set_device() -> None:
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # a new thread uses the first GPU by default

    with ThreadPoolExecutor(1, initializer=set_device) as pool:
        upcoming = pool.submit(next, batches, None)
        while (batch := upcoming.result()) is not None:
            upcoming = pool.submit(next, batches, None)
            yield batch
