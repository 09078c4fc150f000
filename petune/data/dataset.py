"""The dataset that the rest of petune works with: images in memory-mapped arrays, and their targets.

Legend: N images, H height, W width, C channels.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from petune.base.errors import ConfigError, DataError
from petune.base.text import plural
from petune.data.cut import Samples, draw_shots, held_out
from petune.data.statistics import Statistics, channel_statistics, value_range
from petune.data.target import Target, TargetKind

__all__ = ["Dataset", "Images", "OnBroken", "Split", "Target", "TargetKind"]

OnBroken = Literal["error", "skip"]
"""Policy for an image that cannot be decoded: stop, or skip it."""
MAX_BROKEN = 0.01
"""Largest share of images that are skipped."""
FRAMES = 8
"""Frames of a clip unless the backbone or the dataset's options say otherwise: for models of images, or none."""
TEST_FRACTION = 0.2
FEW_TEST_IMAGES = 10
"""The accuracy on fewer images of a class has a standard error of up to 16 points."""
CUT_TEST_NOTE = f" (no test split: {TEST_FRACTION:.0%} of train is used for testing)"
IMAGE_TYPES = ("uint8", "uint16", "float32")


class Images(Protocol):
    """Images by row: a memory-mapped array, or an object that decodes on request."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, H, W, C); of clips of T frames (N, T, H, W, C)."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of a pixel."""

    def __len__(self) -> int:
        """Return N."""

    def __getitem__(self, rows: Any) -> Any:
        """Return the images of these rows, as an array."""


@runtime_checkable
class RandomClips(Protocol):
    """Clips of videos that have more frames than a clip."""

    def draw(self, rows: NDArray[np.int64], seeds: NDArray[np.int64]) -> NDArray[Any]:
        """Return random clips of these rows, (B, T, H, W, C), each a function of its seed."""


@dataclass(frozen=True)
class Split:
    """Images and targets of one split.

    Attributes:
        images: uint8, uint16 (65535 is white) or float32, (M, H, W, C), or clips, uint8 (M, T, H, W, C), in which
            `rows` finds this split's, as `images_at` does; usually memory-mapped: index it, do not copy it.
        targets: One per image, see `Target`; masks are indexed by `rows`, as images are.
        rows: int64, (N,), the row in `images` of each image (splits may share an array). Copies of a file share the
            row of the first one.
        crop: Fraction of each side that the model sees; below 1 if images are stored with a margin.
        weights: float64, (N,), weight of each image in the loss; None if all count the same.
        groups: int64, (N,), images of one group (a patient, a video) are never divided; None if there are no groups.
        names: str, (N,), the file or key of each image, for people; None if images have only a position.
    """

    images: Images
    targets: NDArray[Any]
    rows: NDArray[np.int64]
    crop: float = 1.0
    weights: NDArray[np.float64] | None = None
    groups: NDArray[np.int64] | None = None
    names: NDArray[np.str_] | None = None

    @classmethod
    def of(cls, images: Images, targets: NDArray[Any], crop: float = 1.0) -> Split:
        """Return a split with all of `images`, in order."""
        return cls(images, targets, np.arange(len(targets)), crop)

    def __len__(self) -> int:
        return len(self.rows)

    def channel_statistics(self) -> Statistics:
        """Return mean and standard deviation per channel, white at 1, from up to 20,000 evenly spaced images."""
        return channel_statistics(self.images, self._spaced_rows())

    def value_range(self) -> tuple[float, float]:
        """Return the smallest and the largest value, white at 1, of up to 20,000 evenly spaced images."""
        return value_range(self.images, self._spaced_rows())

    def _spaced_rows(self) -> NDArray[np.int64]:
        return self.rows[:: max(1, len(self) // 10_000)]

    def take(self, positions: NDArray[np.int64]) -> Split:
        """Return the split with only these positions; the images are shared."""
        return replace(
            self,
            targets=self.targets if self.has_masks else self.targets[positions],
            rows=self.rows[positions],
            weights=None if self.weights is None else self.weights[positions],
            groups=None if self.groups is None else self.groups[positions],
            names=None if self.names is None else self.names[positions],
        )

    @property
    def num_frames(self) -> int | None:
        """Frames of a clip; None if the samples are images."""
        return self.images.shape[1] if len(self.images.shape) == 5 else None

    @property
    def has_masks(self) -> bool:
        """True if the targets are masks."""
        return self.targets.ndim == 3

    def images_at(self, positions: NDArray[np.int64] | slice) -> NDArray[Any]:
        """Return the images at these positions of the split, as `targets_at` does their targets."""
        return np.asarray(self.images[self.rows[positions]])

    def targets_at(self, positions: NDArray[np.int64]) -> NDArray[Any]:
        """Return the targets of the images at these positions of the split."""
        return self.targets[self.rows[positions] if self.has_masks else positions]

    def samples(self, kind: TargetKind) -> Samples:
        """Return what decides how the split may be divided."""
        return Samples(kind, self.targets, self.rows, self.groups)


@dataclass(frozen=True)
class Dataset:
    """Three splits with targets of the same kind and names.

    Attributes:
        name: The name on the command line, such as `cifar10` or `folder:pets`.
        target: Kind and names of the targets.
        source: Where the images were read from, for the record.
        augment: The augmentation preset that suits these images.
        train, val, test: The splits; `val` is empty until `with_val` has cut one.
        license, citation: Of the images, where they are known.
        refit: The protocol of the dataset trains again on train and val when val has chosen; see `final_fit`.
        may_lack_classes: The names of the classes come with the dataset, so that some may have no training image.
        cut_test: `with_test` cut the test split from train.
        kept_splits: Images are in the splits that an earlier run had them in; see `petune.runner.kept_splits`.
    """

    name: str
    target: Target
    source: str
    augment: str
    train: Split
    val: Split
    test: Split
    license: str = ""
    citation: str = ""
    refit: bool = False
    may_lack_classes: bool = False
    cut_test: bool = False
    kept_splits: bool = False

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in label order; empty if the targets are numbers."""
        return self.target.classes

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    def validated(self) -> Dataset:
        """Return the dataset after checking its splits and targets; classes of any whole type become int64.

        Raises:
            DataError: Too few classes, a class without training images, no test images, a target out of range or not
                finite, or a group in two splits.
        """
        self._check_names()
        splits = {"train": self.train, "val": self.val, "test": self.test}
        for part, split in splits.items():
            _check_images(split, f"{self.name}/{part}")
            _check_lengths(split, f"{self.name}/{part}")
            self.target.check(split.targets, f"{self.name}/{part}")
        if self.target.kind == "class" and any(split.targets.dtype != np.int64 for split in splits.values()):
            whole = {part: replace(split, targets=split.targets.astype(np.int64)) for part, split in splits.items()}
            return replace(self, train=whole["train"], val=whole["val"], test=whole["test"]).validated()
        empty = self.target.absent(self.train.targets)
        if empty and not self.may_lack_classes:
            raise DataError(f"{self.name} has no training images for {', '.join(empty[:5])}")
        if not len(self.train):
            raise DataError(f"{self.name} has no training images")
        if not len(self.test):
            few = "groups" if self.train.groups is not None else "different images"
            raise DataError(
                f"{self.name} has no test images. A test split can only be cut from classes with at least two {few}"
            )
        _check_groups(self.name, splits)
        return self

    def _check_names(self) -> None:
        if self.target.kind in {"class", "mask"} and self.num_classes < 2:
            raise DataError(
                f"{self.name} has {plural(self.num_classes, 'class', 'classes')}: {list(self.classes)}. "
                "At least two are needed"
            )
        twice = [name for name, count in Counter(self.target.names).items() if count > 1]
        if twice:
            raise DataError(f"{self.name} has the name {twice[0]} twice among {list(self.target.names)[:20]}")
        if not self.target.names:
            raise DataError(f"{self.name} names no {'number' if self.target.kind == 'number' else 'label'} to learn")

    def with_test(self) -> Dataset:
        """Cut a stratified test split from train, always the same one, unless the dataset has a test split."""
        if len(self.test):
            return self
        in_test = held_out(self.train.samples(self.target.kind), TEST_FRACTION, seed=0)
        train, test = (self.train.take(np.flatnonzero(mask)) for mask in (~in_test, in_test))
        return replace(self, train=train, test=test, cut_test=True)

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
        in_val = held_out(self.train.samples(self.target.kind), fraction, seed)
        if not in_val.any() or in_val.all():
            few = "groups" if self.train.groups is not None else "different images"
            raise ConfigError(
                f"val_fraction={fraction} of {plural(len(self.train), 'training image')} leaves a split empty. A "
                f"class needs two {few}, besides those cut for test, to give one to val. Add images, or a val split"
            )
        train, val = (self.train.take(np.flatnonzero(mask)) for mask in (~in_val, in_val))
        cut = replace(self, train=train, val=val)
        return cut.with_note(cut.missing_classes_note("val"))

    def with_note(self, note: str) -> Dataset:
        """Append a note to `source`; an empty note changes nothing."""
        return replace(self, source=f"{self.source}; {note}") if note else self

    def missing_classes_note(self, part: Literal["val", "test"]) -> str:
        """Return a note naming the classes without images in a split; empty if every class has some."""
        absent = self.target.absent((self.val if part == "val" else self.test).targets)
        shown = ", ".join(absent[:5]) + (f" and {len(absent) - 5} more" if len(absent) > 5 else "")
        return f"no {part} image of {shown}" if absent else ""

    def few_test_images_note(self) -> str:
        """Return a warning naming the classes with few test images; empty if every class has enough."""
        if self.target.kind != "class":
            return ""
        counts = np.bincount(self.test.targets, minlength=self.num_classes)
        few = [
            f"{name} ({count})" for name, count in zip(self.classes, counts, strict=True) if 0 < count < FEW_TEST_IMAGES
        ]
        if not few:
            return ""
        shown = ", ".join(few[:5]) + (f" and {len(few) - 5} more" if len(few) > 5 else "")
        return (
            f"warning: classes with fewer than {FEW_TEST_IMAGES} test images, whose accuracy is mostly chance: {shown}"
        )

    def with_shots(self, count: int, seed: int) -> Dataset:
        """Keep `count` training images per class, drawn by `seed` (few-shot).

        Raises:
            ConfigError: A class has fewer images, or the targets are not classes of images.
        """
        targets = self.train.targets
        if self.target.kind == "class":
            counts = np.bincount(targets, minlength=self.num_classes)
        elif self.target.kind == "multi_hot":
            counts = targets.sum(0, dtype=np.int64)
        else:
            raise ConfigError(
                f"shots counts images per class, but the targets of {self.name} are of kind {self.target.kind!r}. "
                "Leave shots out"
            )
        smallest = int(counts.min())
        if count > smallest:
            raise ConfigError(
                f"shots is {count}, but the smallest class of {self.name} has "
                f"{plural(smallest, 'training image')}. Use at most {smallest}"
            )
        return replace(self, train=self.train.take(draw_shots(self.train.samples(self.target.kind), count, seed)))


def _check_images(split: Split, where: str) -> None:
    """Check shape and type of the images, and that every row is one of them."""
    shape, dtype = tuple(split.images.shape), str(split.images.dtype)
    if len(shape) not in {4, 5} or shape[-3] != shape[-2] or dtype not in IMAGE_TYPES:
        raise DataError(
            f"{where}: images of shape {shape} and type {dtype}. They are squares, (N, S, S, C), of uint8, uint16 or "
            "float32; clips are (N, T, S, S, C)"
        )
    if len(shape) == 5 and split.has_masks:
        raise DataError(f"{where}: clips with masks. Use one target for each clip")
    if len(split) and not (split.rows.min() >= 0 and split.rows.max() < shape[0]):
        raise DataError(f"{where}: rows from {split.rows.min()} to {split.rows.max()} of {plural(shape[0], 'image')}")


def _check_lengths(split: Split, where: str) -> None:
    """Check that there is one target, weight and group per image."""
    if not split.has_masks and len(split.targets) != len(split):
        raise DataError(f"{where}: {plural(len(split.targets), 'target')} for {plural(len(split), 'image')}")
    for name, values in (("weights", split.weights), ("groups", split.groups), ("names", split.names)):
        if values is not None and values.shape != (len(split),):
            raise DataError(f"{where}: {name} of shape {values.shape} for {plural(len(split), 'image')}")
    if split.weights is not None and not (np.isfinite(split.weights).all() and (split.weights >= 0).all()):
        raise DataError(f"{where}: a weight is negative or not finite. Use weights from 0")


def _check_groups(name: str, splits: dict[str, Split]) -> None:
    first: dict[int, str] = {}
    for part, split in splits.items():
        for group in [] if split.groups is None else np.unique(split.groups).tolist():
            if first.setdefault(group, part) != part:
                raise DataError(
                    f"{name}: group {group} is in {first[group]} and in {part}. Move its images into one split"
                )
