"""The dataset that the rest of petune works with: uint8 images in memory-mapped arrays, labels, class names.

Legend: N images, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from petune.base.errors import ConfigError, DataError
from petune.base.text import plural

CHUNK = 32
"""Images per step of computing statistics; bounds the memory."""
OnBroken = Literal["error", "skip"]
"""Policy for an image that cannot be decoded: stop, or skip it."""


@dataclass(frozen=True)
class Split:
    """Images and labels of one split.

    Attributes:
        images: uint8, (N, H, W, 3), usually memory-mapped: index it, do not copy it.
        labels: int64, (N,), from 0 to the number of classes - 1.
        rows: int64, (N,), the row in `images` of each image (splits may share an array). Copies of a file share the
            row of the first one.
        crop: Fraction of each side that the model sees; below 1 if images are stored with a margin.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    rows: NDArray[np.int64]
    crop: float = 1.0

    @classmethod
    def of(cls, images: NDArray[np.uint8], labels: NDArray[np.int64], crop: float = 1.0) -> Split:
        """Return a split with all of `images`, in order."""
        return cls(images, labels, np.arange(len(labels)), crop)

    def __len__(self) -> int:
        return len(self.rows)

    def channel_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and standard deviation per channel in [0, 1], from up to 20,000 evenly spaced images."""
        chosen = self.rows[:: max(1, len(self) // 10_000)]
        counts_C256 = np.zeros((3, 256), np.int64)  # pixels as float64 would take 8 times the memory of the images
        for start in range(0, len(chosen), CHUNK):
            pixels_NC = np.asarray(self.images[chosen[start : start + CHUNK]]).reshape(-1, 3)
            counts_C256 += [np.bincount(channel, minlength=256) for channel in pixels_NC.T]
        values_256 = (np.arange(256, dtype=np.float32) / 255).astype(np.float64)
        shares_C256 = counts_C256 / counts_C256.sum(1, keepdims=True)
        mean = shares_C256 @ values_256
        std = np.sqrt((shares_C256 * (values_256 - mean[:, None]) ** 2).sum(1))
        return tuple(round(float(m), 6) for m in mean), tuple(round(max(float(s), 1e-3), 6) for s in std)

    def take(self, positions: NDArray[np.int64]) -> Split:
        """Return the split with only these positions; the images are shared."""
        return replace(self, labels=self.labels[positions], rows=self.rows[positions])


@dataclass(frozen=True)
class Dataset:
    """Three splits with the same classes.

    Attributes:
        name: The name on the command line, such as `cifar10` or `folder:pets`.
        classes: Class names in label order.
        source: Where the images were read from, for the record.
        augment: The augmentation preset that suits these images.
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
        """Number of classes."""
        return len(self.classes)

    def validated(self) -> Dataset:
        """Return the dataset after checking its classes and labels.

        Raises:
            DataError: Fewer than two classes, a class without training images, no test images, or a label out of
                range.
        """
        if self.num_classes < 2:
            raise DataError(
                f"{self.name} has {plural(self.num_classes, 'class', 'classes')}: {list(self.classes)}. "
                "At least two are needed"
            )
        for part, split in (("train", self.train), ("val", self.val), ("test", self.test)):
            if len(split) and not 0 <= int(split.labels.min()) <= int(split.labels.max()) < self.num_classes:
                span = f"{split.labels.min()}..{split.labels.max()}"
                raise DataError(f"{self.name}/{part}: labels are {span}, outside 0..{self.num_classes - 1}")
        empty = self._absent_classes(self.train)
        if empty:
            raise DataError(f"{self.name} has no training images for {', '.join(empty[:5])}")
        if not len(self.test):
            raise DataError(
                f"{self.name} has no test images. A test split can only be cut from classes with at least two "
                "different images"
            )
        return self

    def with_val(self, fraction: float, seed: int) -> Dataset:
        """Cut a stratified validation split from train, unless the dataset has one.

        Args:
            fraction: Share of train, strictly between 0 and 1.
            seed: Selects the images; the same seed always selects the same ones.

        Raises:
            ConfigError: The fraction would leave train or val empty.
        """
        if len(self.val):
            return self
        held_out = stratified_mask(self.train.labels, self.train.rows, fraction, seed)
        if not held_out.any() or held_out.all():
            raise ConfigError(
                f"val_fraction={fraction} of {plural(len(self.train), 'training image')} leaves a split empty. A "
                "class needs two different images, besides those cut for test, to give one to val. Add "
                "images, or a val folder"
            )
        positions = np.arange(len(self.train))
        cut = replace(self, train=self.train.take(positions[~held_out]), val=self.train.take(positions[held_out]))
        return cut.with_note(cut.missing_classes_note("val"))

    def with_note(self, note: str) -> Dataset:
        """Append a note to `source`; an empty note changes nothing."""
        return replace(self, source=f"{self.source}; {note}") if note else self

    def missing_classes_note(self, part: Literal["val", "test"]) -> str:
        """Return a note naming the classes without images in a split; empty if every class has some."""
        absent = self._absent_classes(self.val if part == "val" else self.test)
        shown = ", ".join(absent[:5]) + (f" and {len(absent) - 5} more" if len(absent) > 5 else "")
        return f"no {part} image of {shown}" if absent else ""

    def with_shots(self, count: int, seed: int) -> Dataset:
        """Keep `count` training images per class, drawn by `seed` (few-shot).

        Raises:
            ConfigError: A class has fewer images.
        """
        smallest = int(np.bincount(self.train.labels, minlength=self.num_classes).min())
        if count > smallest:
            raise ConfigError(
                f"shots is {count}, but the smallest class of {self.name} has "
                f"{plural(smallest, 'training image')}. Use at most {smallest}"
            )
        chosen = [order[:count] for order in _shuffled_by_class(self.train.labels, seed)]
        return replace(self, train=self.train.take(np.sort(np.concatenate(chosen))))

    def _absent_classes(self, split: Split) -> Sequence[str]:
        counts = np.bincount(split.labels, minlength=self.num_classes)
        return [self.classes[i] for i in np.flatnonzero(counts == 0)]


def stratified_mask(
    labels: NDArray[np.int64], rows: NDArray[np.int64], fraction: float, seed: int
) -> NDArray[np.bool_]:
    """Select a share of each class: at least one image, and never a whole class.

    A class with a single image keeps it. Copies of a file (equal rows) are always selected together, because testing
    on a copy of a training image would measure memorization.

    Args:
        labels: int64 (N,).
        rows: int64 (N,); see `Split`.
        fraction: Share of each class.
        seed: Selects the images.

    Returns:
        Mask, bool (N,).
    """
    _, first, group = np.unique(rows, return_index=True, return_inverse=True)
    selected = np.zeros(len(first), dtype=bool)
    for order in _shuffled_by_class(labels[first], seed):
        count = min(max(1, round(len(order) * fraction)), len(order) - 1)
        selected[order[:count]] = True
    return selected[group]


def _shuffled_by_class(labels: NDArray[np.int64], seed: int) -> list[NDArray[np.int64]]:
    generator = np.random.Generator(np.random.Philox(key=[seed, 0x5EED]))
    return [generator.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
