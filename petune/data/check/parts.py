"""List the images of a dataset by split, with their targets as text and what one look at each image tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from petune.base.errors import DataError
from petune.data.band_files import form_of_all
from petune.data.check.gray_images import GrayImages, read_arrays, read_files
from petune.data.check.report import DataReport
from petune.data.dataset import Dataset, Split, Target
from petune.data.doubtful_classes import names_of_splits_note
from petune.data.layout import ClassFiles, list_images
from petune.data.splits import left_out_note

MAX_MASKS = 2000
"""Masks of which the classes are counted, evenly spaced."""
NUM_BINS = 10
"""Intervals of numbers."""


@dataclass(frozen=True)
class Part:
    """A split to check.

    Attributes:
        names: Of each image: its file, or split and position.
        targets: Of each image as text; equal texts are equal targets.
        counts: Number of images by class, label or interval.
        images: Hashes, sizes and errors.
    """

    names: list[str]
    targets: list[str]
    counts: dict[str, int]
    images: GrayImages


def folder_parts(path: Path, report: DataReport) -> dict[str, Part]:
    """Read a folder of class folders, broken images included.

    Raises:
        DataError: The layout is wrong: see `petune.data.folder`.
    """
    splits, report.skipped = list_images(path)
    try:
        form_of_all([file for classes in splits.values() for files in classes.values() for file in files])
    except DataError as error:
        report.mixed_channels = str(error)
    report.left_out = left_out_note(path)
    report.doubtful_classes = names_of_splits_note(splits["train"])
    return {part: _folder_part(classes) for part, classes in splits.items()}


def _folder_part(classes: ClassFiles) -> Part:
    files = [file for images in classes.values() for file in images]
    targets = [name for name, images in classes.items() for _ in images]
    counts = {name: len(images) for name, images in classes.items()}
    return Part(list(map(str, files)), targets, counts, read_files(files))


def dataset_parts(dataset: Dataset) -> dict[str, Part]:
    """Read the splits of a loaded dataset that have images; from their files, if the names are files."""
    splits = {"train": dataset.train, "val": dataset.val, "test": dataset.test}
    filled = {part: split for part, split in splits.items() if len(split)}
    edges = _bin_edges(dataset.target, filled)
    parts = {}
    for part, split in filled.items():
        names = [f"{part} {i}" for i in range(len(split))] if split.names is None else split.names.tolist()
        is_files = split.names is not None and split.num_frames is None and Path(names[0]).is_file()
        images = read_files([Path(name) for name in names]) if is_files else read_arrays(split)
        parts[part] = Part(names, _texts(dataset.target, split), _counts(dataset.target, split, edges), images)
    return parts


def _texts(target: Target, split: Split) -> list[str]:
    return [""] * len(split) if target.kind == "mask" else [target.text(value) for value in split.targets]


def _counts(target: Target, split: Split, edges: Mapping[str, NDArray[np.float64]]) -> dict[str, int]:
    if target.kind == "class":
        numbers = np.bincount(split.targets, minlength=len(target.names))
    elif target.kind == "multi_hot":
        numbers = split.targets.sum(0, dtype=np.int64)
    elif target.kind == "mask":
        numbers = _images_with_class(target, split)
    else:
        return _binned(target, split, edges)
    return dict(zip(target.names, numbers.tolist(), strict=True))


def _images_with_class(target: Target, split: Split) -> NDArray[Any]:
    chosen = np.arange(0, len(split), max(1, len(split) // MAX_MASKS))
    numbers = np.zeros(256, np.int64)
    for position in chosen:
        numbers[np.unique(split.targets_at(np.array([position])))] += 1
    return numbers[: len(target.names)]


def _bin_edges(target: Target, splits: Mapping[str, Split]) -> dict[str, NDArray[np.float64]]:
    """Return the borders of the intervals of each number, the same for all splits."""
    if target.kind != "number":
        return {}
    values = np.concatenate([split.targets for split in splits.values()])
    return {name: np.histogram_bin_edges(values[:, i], NUM_BINS) for i, name in enumerate(target.names)}


def _binned(target: Target, split: Split, edges: Mapping[str, NDArray[np.float64]]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for i, name in enumerate(target.names):
        numbers, _ = np.histogram(split.targets[:, i], edges[name])
        borders = [f"{edge:.4g}" for edge in edges[name]]
        for low, high, number in zip(borders, borders[1:], numbers.tolist(), strict=False):
            counts[f"{name} {low} to {high}"] = number
    return counts
