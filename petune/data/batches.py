"""Turn a split into normalized batches on a device.

Legend: B batch, C channels, H height, W width. Clips have one dimension more, T frames, after B.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from petune.base.errors import ConfigError
from petune.base.text import plural
from petune.data.augment import (
    MOVING_PRESETS,
    augment,
    augment_masks,
    epoch_order,
    frame_seeds,
    image_seeds,
    random_draws,
)
from petune.data.balanced import balanced_order
from petune.data.dataset import Split
from petune.data.images import num_threads
from petune.data.on_request import decodes
from petune.data.policy import ImagePolicy
from petune.data.preprocess import (
    Preprocess,
    center_crop,
    in_model_order,
    read_image,
    read_images,
    seen_size,
    to_device,
)
from petune.data.steps import StepConfig, steps_of
from petune.data.video.clips import Clips
from petune.data.workers import BatchMemory, ImageWorkers, image_workers, one_ahead

CPU = torch.device("cpu")
AUGMENT_FORMAT = 1
"""Raised when a preset of `petune.data.steps` draws or computes other pixels, so that no epoch mixes both."""
MAX_LEFT_OUT = 0.05
"""Share of the training images that an epoch may leave out so that all its batches are full."""


@dataclass(frozen=True)
class Batch:
    """Images of one step, or the part of them that one process takes.

    Attributes:
        x_BCHW: Normalized images (B, 3, H, W), or clips (B, T, 3, H, W). Of several views of a video, all views of the
            first one, then those of the next.
        y_B: Targets, one per image: (B,), (B, C), (B, K) or (B, S, S); see `petune.data.target.Target`.
        positions: Position of each image in the split.
        num_images: Images of the whole batch, of all processes together.
        views: Clips and crops of each video in tests, whose outputs are averaged.
    """

    x_BCHW: Tensor
    y_B: Tensor
    positions: NDArray[np.int64]
    num_images: int
    views: int = 1


class _Plan(NamedTuple):
    """The ingredients of a batch: positions of its images, their random numbers, and the images of all processes.

    `frames` decide which frames of videos are read; None reads those of tests.
    """

    positions: NDArray[np.int64]
    numbers: NDArray[Any]
    num_images: int
    frames: NDArray[np.int64] | None


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

    Raises:
        ConfigError: There is no pair of images for an even batch.
    """
    usable = num_images - num_images % 2 if even else num_images
    size = min(batch_size, usable)
    if even and size < 2:
        raise ConfigError(
            f"mixup and cutmix need two images in a batch: train has {num_images}, and batch_size is {batch_size}"
        )
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
        augmentation: Name of a preset, or a list of augmentations.
        batch_size: Images per batch; see `batch_bounds`.
        seed: Seed of order and augmentation.
        device: Device of the batches.
        even: See `batch_bounds`.
        ignore_index: Value of the pixels of a mask that no pixel of the image moves to.
        balanced: Draw every class equally often, instead of every image once.

    Attributes:
        batch_size: Images of the largest batch.
    """

    def __init__(
        self,
        split: Split,
        preprocess: Preprocess,
        augmentation: str | Sequence[StepConfig],
        batch_size: int,
        seed: int,
        device: torch.device,
        *,
        even: bool = False,
        ignore_index: int = 255,
        balanced: bool = False,
    ) -> None:
        self.split = split
        self.balanced = balanced
        self.preprocess = preprocess
        self.augmentation = augmentation
        self.ignore_index = ignore_index
        self.policy: ImagePolicy | None = None
        if steps_of(augmentation) is not None:
            self.policy = ImagePolicy(augmentation, preprocess.image_size, ignore_index)
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
        noun = "images" if self.split.num_frames is None else "videos"
        sizes = " or ".join(f"{size}" for size in sorted({*self.sizes.tolist()}))
        return (
            f"each epoch has {plural(len(self), 'batch', 'batches')} of {sizes} {noun}, because full ones of {full} "
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

        Each batch is prepared while the previous one is in use, except for presets that a CPU applies to whole batches.

        Args:
            epoch: Number of the epoch, from 0.
            start: First batch to yield.
            part: Returns the images to yield of a batch of that size; every process of a distributed run takes its own.
            positions_only: Yield positions of the images in the split, int64 (B,), instead of the images.
        """
        batches = self._epoch(epoch, start, part, positions_only)
        ahead = self.device.type == "cuda" or self.policy is not None or decodes(self.split)
        return prefetch(batches, self.device) if ahead and not positions_only else batches

    def _epoch(self, epoch: int, start: int, part: Callable[[int], slice], positions_only: bool) -> Iterator[Batch]:
        plans = self._plans(epoch, start, part)
        if self.policy is not None and not positions_only:
            yield from self._one_by_one(plans)
            return
        for plan in plans:
            positions = plan.positions
            if positions_only:
                x, y = torch.from_numpy(positions), _targets(self.split, self.preprocess, positions, self.device)
            else:
                x, y = self._together(positions, plan.numbers, plan.frames)
            yield Batch(x, y, positions, plan.num_images)

    def _plans(self, epoch: int, start: int, part: Callable[[int], slice]) -> Iterator[_Plan]:
        order, number_of = self._order(epoch)
        numbers = (random_draws if self.policy is None else image_seeds)(self.seed, epoch, len(self.split))
        frames = None if self.augmentation == "none" else frame_seeds(self.seed, epoch, len(self.split))
        for step in range(start, len(self)):
            size = int(self.sizes[step])
            chosen = slice(self.bounds[step], self.bounds[step + 1])
            drawn = number_of[chosen][part(size)]
            yield _Plan(order[chosen][part(size)], numbers[drawn], size, None if frames is None else frames[drawn])

    def _order(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the position of each image of an epoch, and which of the epoch's random numbers are the image's."""
        if not self.balanced:
            order = epoch_order(self.seed, epoch, len(self.split))
            return order, order
        # an image that comes twice is augmented in two ways
        return balanced_order(self.seed, epoch, self.split.targets), np.arange(len(self.split))

    def _together(
        self, positions: NDArray[np.int64], draws: NDArray[Any], frames: NDArray[np.int64] | None
    ) -> tuple[Tensor, Tensor]:
        """Return images augmented by a preset that works on whole batches, on the device, and their targets."""
        preset, u = str(self.augmentation), to_device(torch.from_numpy(draws), self.device)
        x_BCHW = self.preprocess.fit(self.split, read_images(self.split, positions, self.device, frames))
        x_BCHW = augment(x_BCHW if preset in MOVING_PRESETS else x_BCHW.float(), preset, u)
        y = _targets(self.split, self.preprocess, positions, self.device)
        if self.split.has_masks:
            y = augment_masks(y, preset, u, self.ignore_index)
        return self.preprocess.normalize(x_BCHW), y

    def _one_by_one(self, plans: Iterator[_Plan]) -> Iterator[Batch]:
        """Yield batches of images that threads read and augment, each as a whole; they begin with the next batch early.

        On a CPU the threads normalize the images too; a GPU gets them as uint8.
        """
        memory = BatchMemory(self.batch_size, self.preprocess.shape)
        with image_workers(num_threads()) as workers:
            yield from one_ahead(self._started(plan, workers, memory) for plan in plans)

    def _started(self, plan: _Plan, workers: ImageWorkers, memory: BatchMemory) -> Callable[[], Batch]:
        """Start to prepare a batch, and return what waits for it."""
        pre, split, policy = self.preprocess, self.split, self.policy
        assert policy is not None
        positions = plan.positions
        x_BCHW = memory.empty(len(positions)) if self.device.type == "cpu" else None
        size = seen_size(split)
        draws = [policy.draw(seed, *size) for seed in plan.numbers.tolist()]

        def prepare(number: int) -> tuple[Tensor, Tensor | None]:
            mask = None
            if split.has_masks:
                mask = center_crop(torch.from_numpy(split.targets_at(positions[number : number + 1])[0]), split.crop)
            image = read_image(split, int(positions[number]), None if plan.frames is None else int(plan.frames[number]))
            image, mask = policy.apply(image, mask, draws[number])
            if x_BCHW is not None:
                x_BCHW[number].copy_(pre.in_channels(image))
            return image, mask

        def normalize(part: slice) -> None:
            if x_BCHW is not None:
                pre.normalize_(x_BCHW[part])

        wait = workers.start(prepare, len(positions), normalize)

        def finish() -> Batch:
            samples = wait()
            masks = [mask for _, mask in samples if mask is not None]
            y = to_device(torch.stack(masks), self.device) if masks else _targets(split, pre, positions, self.device)
            x = x_BCHW
            if x is None:
                x = pre.normalize(to_device(torch.stack([image for image, _ in samples]), self.device))
            return Batch(x, y, positions, plan.num_images)

        return finish


def eval_batches(
    split: Split, preprocess: Preprocess, batch_size: int, device: torch.device, *, positions_only: bool = False
) -> Iterator[Batch]:
    """Yield all images of a split in order, including an incomplete last batch; masks at the model's size.

    Of videos with several views, a batch has all views of some videos, about as many clips as `batch_size`.

    Args:
        split: The images.
        preprocess: Size and statistics that the backbone expects.
        batch_size: Images per batch.
        device: Device of the batches.
        positions_only: As in `TrainBatches`.
    """
    batches = _in_order(split, preprocess, batch_size, device, positions_only)
    return prefetch(batches, device) if decodes(split) and not positions_only else batches


def _in_order(
    split: Split, preprocess: Preprocess, batch_size: int, device: torch.device, positions_only: bool
) -> Iterator[Batch]:
    views = 1 if positions_only else num_views(split)
    batch_size = samples_per_batch(split, batch_size)
    for start in range(0, len(split), batch_size):
        positions = np.arange(start, min(start + batch_size, len(split)))
        if positions_only:
            x = torch.from_numpy(positions)
        else:
            pixels = read_images(split, positions, device) if views == 1 else _read_views(split, positions, device)
            x = preprocess.normalize(preprocess.fit(split, pixels))
        yield Batch(x, _targets(split, preprocess, positions, device), positions, len(positions), views)


def num_views(split: Split) -> int:
    """Return how many clips and crops of each video a test averages over; 1 for images."""
    return len(split.images.views) if isinstance(split.images, Clips) else 1


def samples_per_batch(split: Split, batch_size: int) -> int:
    """Return how many samples of a split a test batch has: fewer than `batch_size` if each has several views."""
    return max(1, batch_size // num_views(split))


def _read_views(split: Split, positions: NDArray[np.int64], device: torch.device) -> Tensor:
    """Return all views of some videos, (B * V, T, C, H, W)."""
    assert isinstance(split.images, Clips)
    rows = split.rows[positions]
    pixels = np.stack([split.images.view(rows, number) for number in range(len(split.images.views))], 1)
    return in_model_order(pixels.reshape(-1, *pixels.shape[2:]), split.crop, device)


def _targets(split: Split, preprocess: Preprocess, positions: NDArray[np.int64], device: torch.device) -> Tensor:
    if split.has_masks:
        return preprocess.masks(split, positions, device)
    return to_device(torch.from_numpy(np.ascontiguousarray(split.targets_at(positions))), device)


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
