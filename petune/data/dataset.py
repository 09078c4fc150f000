"""What a dataset is to the rest of petune: uint8 images in memory-mapped arrays, labels, class names.

Legend: N images, H height, W width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from petune.base.errors import ConfigError, DataError

CHUNK = 32
"""Images that statistics take into memory at once."""
OnBroken = Literal["error", "skip"]
"""What an image that cannot be decoded is: an error, or left out."""


@dataclass(frozen=True)
class Split:
    """Images and labels of one split.

    Attributes:
        images: uint8, (N, H, W, 3), usually memory-mapped: index it, do not copy it.
        labels: int64, (N,), from 0 to the number of classes - 1.
        rows: int64, (N,), where each image of this split lies in `images` (a split may share its array): copies of
            one file where the first of them does.
        crop: Share of the side that a model gets to see; below 1 where images were stored with a margin.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    rows: NDArray[np.int64]
    crop: float = 1.0

    @classmethod
    def of(cls, images: NDArray[np.uint8], labels: NDArray[np.int64], crop: float = 1.0) -> Split:
        """A split that holds all of `images`, in order."""
        return cls(images, labels, np.arange(len(labels)), crop)

    def __len__(self) -> int:
        return len(self.rows)

    def channel_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of the channels in [0, 1], of evenly spaced images: fewer than 20,000."""
        chosen = self.rows[:: max(1, len(self) // 10_000)]
        counts_C256 = np.zeros((3, 256), np.int64)  # an image's pixels as float64 would be 24 times its file
        for start in range(0, len(chosen), CHUNK):
            pixels_NC = np.asarray(self.images[chosen[start : start + CHUNK]]).reshape(-1, 3)
            counts_C256 += [np.bincount(channel, minlength=256) for channel in pixels_NC.T]
        values_256 = (np.arange(256, dtype=np.float32) / 255).astype(np.float64)
        shares_C256 = counts_C256 / counts_C256.sum(1, keepdims=True)
        mean = shares_C256 @ values_256
        std = np.sqrt((shares_C256 * (values_256 - mean[:, None]) ** 2).sum(1))
        return tuple(round(float(m), 6) for m in mean), tuple(round(max(float(s), 1e-3), 6) for s in std)

    def take(self, positions: NDArray[np.int64]) -> Split:
        """The split with only these positions, sharing the images."""
        return replace(self, labels=self.labels[positions], rows=self.rows[positions])


@dataclass(frozen=True)
class Dataset:
    """Three splits with the same classes.

    Attributes:
        name: As on the command line, for example `cifar10` or `folder:pets`.
        classes: Class names in label order.
        source: Where the images were read from, for the record.
        augment: The preset that suits these images.
        train, val, test: The splits; `val` is empty until `with_val` has cut one.
    """

    name: str
    classes: tuple[str, ...]
    source: str
    augment: str
    train: Split
    val: Split
    test: Split

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def checked(self) -> Dataset:
        """The dataset itself, once its labels make sense.

        Raises:
            DataError: Fewer than two classes, a class without training images, or a label out of range.
        """
        if self.num_classes < 2:
            raise DataError(f"{self.name} must have at least two classes, but has {list(self.classes)}")
        for part, split in (("train", self.train), ("val", self.val), ("test", self.test)):
            if len(split) and not 0 <= int(split.labels.min()) <= int(split.labels.max()) < self.num_classes:
                span = f"{split.labels.min()}..{split.labels.max()}"
                raise DataError(f"{self.name}/{part}: labels must lie in 0..{self.num_classes - 1}, not {span}")
        empty = np.flatnonzero(np.bincount(self.train.labels, minlength=self.num_classes) == 0)
        if len(empty):
            names = ", ".join(self.classes[i] for i in empty[:5])
            raise DataError(f"{self.name}: every class must have training images, but {names} have none")
        if not len(self.test):
            raise DataError(f"{self.name} must have test images, but has none; a class needs two different ones")
        return self

    def with_val(self, fraction: float, seed: int) -> Dataset:
        """Cut a stratified validation split from train where the dataset brings none.

        Args:
            fraction: Share of train, strictly between 0 and 1.
            seed: Decides which images; the same seed always cuts the same ones.
        """
        if len(self.val):
            return self
        held_out = stratified(self.train.labels, self.train.rows, fraction, seed)
        if not held_out.any() or held_out.all():
            raise ConfigError(
                f"val_fraction={fraction} of {len(self.train)} training images leaves an empty split; a class must "
                "have two that differ to give one, besides what was taken for test. Add some, or bring a val folder"
            )
        positions = np.arange(len(self.train))
        cut = replace(self, train=self.train.take(positions[~held_out]), val=self.train.take(positions[held_out]))
        return cut.said_to_lack("val")

    def said_to_lack(self, part: Literal["val", "test"]) -> Dataset:
        """The dataset, whose `source` names the classes that a split has no image of: it says nothing of them."""
        split = self.val if part == "val" else self.test
        lacking = [self.classes[i] for i in np.flatnonzero(np.bincount(split.labels, minlength=self.num_classes) == 0)]
        if not lacking:
            return self
        shown = ", ".join(lacking[:5]) + (f" and {len(lacking) - 5} more" if len(lacking) > 5 else "")
        return replace(self, source=f"{self.source}; no {part} image of {shown}")

    def with_shots(self, count: int, seed: int) -> Dataset:
        """Keep `count` training images a class, drawn by `seed` (few-shot)."""
        smallest = int(np.bincount(self.train.labels, minlength=self.num_classes).min())
        if count > smallest:
            raise ConfigError(
                f"shots must be at most {smallest}, since the smallest class of {self.name} has no "
                f"more images, but is {count}"
            )
        kept = [order[:count] for order in _shuffled_by_class(self.train.labels, seed)]
        return replace(self, train=self.train.take(np.sort(np.concatenate(kept))))


def stratified(labels: NDArray[np.int64], rows: NDArray[np.int64], fraction: float, seed: int) -> NDArray[np.bool_]:
    """True for a share of each class, drawn by `seed`: at least one image, and never a whole class.

    A class of a single image keeps it, so it has none that is True. Copies, of equal rows, count as one and are
    True together: what is measured on an image that was trained on is memory.
    """
    _, first, of_first = np.unique(rows, return_index=True, return_inverse=True)
    held_out = np.zeros(len(first), dtype=bool)
    for order in _shuffled_by_class(labels[first], seed):
        count = min(max(1, round(len(order) * fraction)), len(order) - 1)
        held_out[order[:count]] = True
    return held_out[of_first]


def _shuffled_by_class(labels: NDArray[np.int64], seed: int) -> list[NDArray[np.int64]]:
    generator = np.random.Generator(np.random.Philox(key=[seed, 0x5EED]))
    return [generator.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
