"""`check_dataset`: the contract of datasets in executable form, for authors of readers.

Legend: N images, H height, W width, C channels, S side.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from petune.base.arguments import check_arguments
from petune.data.dataset import Dataset, Split
from petune.data.policy import check_augment
from petune.data.preprocess import Preprocess
from petune.data.reader import DatasetReader, ReadContext
from petune.data.registry import build_reader, data_dir_or_default
from petune.data.steps import check_split
from petune.plugin_dev.finding import Finding, Property, examine_all, names_of

SIDE = 32
"""Side in pixels at which images are read for the check; small, so that decoding is fast."""
SAMPLES = 64
"""Images of each split that are compared between two readings."""
LONGEST_ABOUT = 100


@dataclass(frozen=True)
class DatasetTrial:
    """A reader, and what it reads.

    Attributes:
        reader: As configured.
        context: Where it reads from.
    """

    reader: DatasetReader[Any]
    context: ReadContext

    @cached_property
    def dataset(self) -> Dataset:
        """The dataset as it is used: checked, and with a val split."""
        return self.reader.load(self.context).validated().with_val(0.2, seed=0)

    @property
    def splits(self) -> dict[str, Split]:
        """The splits by name."""
        return {"train": self.dataset.train, "val": self.dataset.val, "test": self.dataset.test}


def check_dataset(dataset: str | DatasetReader[Any], data_dir: str | Path | None = None) -> list[str]:
    """Check the contract of a dataset by reading it twice.

    Args:
        dataset: As on the command line, such as `leaves,season=fall`, or a reader.
        data_dir: Directory of downloaded datasets. Defaults to `PETUNE_DATA`, then to the cache directory.

    Returns:
        The names of the properties, all of which hold.

    Raises:
        ContractViolation: The first property that does not hold.
        UnknownName: There is no such dataset.
    """
    check_arguments(
        "petune.check_dataset", dataset=(dataset, str | DatasetReader), data_dir=(data_dir, str | Path | None)
    )
    name = dataset if isinstance(dataset, str) else type(dataset).__name__
    return names_of(examine_dataset(dataset, None if data_dir is None else Path(data_dir)), name)


def examine_dataset(dataset: str | DatasetReader[Any], data_dir: Path | None = None) -> Iterator[Finding]:
    """Yield the finding for each property, as `check_dataset`, without stopping at the first that does not hold."""
    reader = build_reader(dataset) if isinstance(dataset, str) else dataset
    yield from examine_all(PROPERTIES, DatasetTrial(reader, ReadContext(SIDE, data_dir_or_default(data_dir))))


def _description(t: DatasetTrial) -> str:
    about = t.reader.about
    if not about or "\n" in about or len(about) > LONGEST_ABOUT:
        return f"about is {about!r}"
    return ""


def _location(t: DatasetTrial) -> str:
    place = t.reader.find(t.context.data_dir)
    return "" if place is None or (isinstance(place, str) and place) else f"find() returned {place!r}"


def _images_and_targets(t: DatasetTrial) -> str:
    for name, split in t.splits.items():
        if len(split.images.shape) not in {4, 5}:
            return f"images of {name} have shape {split.images.shape}, not (N, H, W, C), or (N, T, H, W, C) for clips"
        frames = t.reader.num_frames(t.context)
        if frames != split.num_frames:
            return f"num_frames() returned {frames}, but a sample of {name} has shape {split.images.shape[1:]}"
        if len(split) and not 0 <= int(split.rows.min()) <= int(split.rows.max()) < len(split.images):
            return f"rows of {name} are outside the {len(split.images)} images"
    channels = int(t.dataset.train.images.shape[-1])
    check_augment(t.dataset.augment, channels=channels)
    check_split(t.dataset.augment, t.dataset.train)
    return "" if len(t.dataset.val) else "no val split can be cut from train"


def _names_before_images(t: DatasetTrial) -> str:
    before, after = t.reader.target(t.context), t.dataset.target
    return "" if before == after else f"target() returned {_shown(before)}, and load() {_shown(after)}"


def _same_images_twice(t: DatasetTrial) -> str:
    again = t.reader.load(t.context).validated().with_val(0.2, seed=0)
    for name, split in t.splits.items():
        other: Split = getattr(again, name)
        if len(split) != len(other):
            return f"{name} has {len(split)} images, and then {len(other)}"
        if _digest(split) != _digest(other):
            return f"{name} has other images or targets, or another order"
    return ""


def _separate_splits(t: DatasetTrial) -> str:
    seen: dict[tuple[int, int], str] = {}
    for name, split in t.splits.items():
        for row in np.unique(split.rows).tolist():
            other = seen.setdefault((id(split.images), row), name)
            if other != name:
                return f"row {row} of the images is in {other} and in {name}"
    return ""


def _pixels(t: DatasetTrial) -> str:
    split = t.dataset.train
    channels = split.images.shape[-1]
    preprocess = Preprocess(SIDE, (0.5,) * channels, (0.5,) * channels, split.num_frames)
    x_BCHW = preprocess.pixels(split, np.arange(min(4, len(split))), torch.device("cpu"))
    if x_BCHW.shape[1:] != preprocess.shape:
        return f"{channels} channels became a batch of shape {tuple(x_BCHW.shape)}"
    if not x_BCHW.isfinite().all():
        return "there are pixels that are NaN or infinite"
    first_color = x_BCHW.flatten(0, -4)[0, :, :1, :1]
    return "all images are a single color" if bool((x_BCHW == first_color).all()) else ""


def _manifest(t: DatasetTrial) -> str:
    first, second = (json.dumps(t.reader.manifest(t.context.data_dir)) for _ in range(2))
    return "" if first == second else "two calls returned different manifests"


PROPERTIES: tuple[Property[DatasetTrial], ...] = (
    Property("description", "`about` says in one short line what it is", _description),
    Property("location", "find() returns a place, or None", _location),
    Property(
        "images and targets",
        "they fit each other and the augmentation; val can be cut",
        _images_and_targets,
    ),
    Property("names before images", "target() returns what load() returns", _names_before_images),
    Property("same images twice", "two readings are equal, to the bit and in order", _same_images_twice),
    Property("separate splits", "no image is in two splits", _separate_splits),
    Property("pixels", "images can be prepared for a model", _pixels),
    Property("manifest", "manifest() returns the same JSON data each time", _manifest),
)


def _shown(target: Any) -> str:
    return f"{target.kind} {list(target.names[:5])}"


def _digest(split: Split) -> str:
    positions = np.unique(np.linspace(0, len(split) - 1, SAMPLES).astype(np.int64)) if len(split) else split.rows
    parts = (split.images_at(positions), split.targets_at(positions))
    return hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in parts)).hexdigest()
