"""Your own images: a folder of class folders, with or without train, val and test above them."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from petune.base.errors import DataError
from petune.data.cache import Allocate, decoded
from petune.data.dataset import Dataset, OnBroken, Split, stratified
from petune.data.images import decode_images
from petune.data.layout import Files, image_files, size_and_time, unread

FORMAT = 2
CROP = 0.875  # timm's usual share of the side that evaluation sees; the rest is kept as a margin
TEST_FRACTION = 0.2
MOST_BROKEN, SKIPPED = 0.01, -1


def load_folder(path: Path, image_size: int, on_broken: OnBroken = "error") -> Dataset:
    """Load PATH/train/CLASS/*, PATH/val/CLASS/*, PATH/test/CLASS/*, or PATH/CLASS/*.

    Without a test folder the val folder is the test split, as in ImageNet, and without either a stratified
    fifth is cut from train, always the same one. Without both, `Dataset.with_val` cuts val from train.

    Args:
        path: The folder.
        image_size: Side in pixels that the images will be used at; they are stored with a margin around it.
        on_broken: What an image that cannot be decoded is: an `error`, or `skip` takes it away before anything is
            drawn, says so in `source`, and is an error above 1 % of a split.

    Raises:
        DataError: No images, fewer than two classes, an empty class, classes that differ between
            splits, or an image that cannot be decoded (with its path).
    """
    found, others = image_files(path)
    side = math.ceil(image_size / CROP)
    skipped: list[Path] = []
    splits = {part: _decode(path, files, side, on_broken == "skip", skipped) for part, files in found.items()}
    train, none = splits["train"], splits["train"].take(np.arange(0))
    dataset = Dataset(f"folder:{path}", tuple(found["train"]), str(path), "crop", train, none, none)
    if "test" in splits:
        dataset = replace(dataset, val=splits.get("val", none), test=splits["test"])
    elif "val" in splits:
        dataset = replace(dataset, test=splits["val"], source=f"{path} (its val folder is the test split)")
    else:
        cut = stratified(train.labels, train.rows, TEST_FRACTION, seed=0)
        dataset = replace(
            dataset,
            train=train.take(np.flatnonzero(~cut)),
            test=train.take(np.flatnonzero(cut)),
            source=f"{path} (no test folder: {TEST_FRACTION:.0%} of each class are the test split)",
        )
    if skipped:
        shown = ", ".join(str(p.relative_to(path)) for p in skipped[:5]) + (", …" if len(skipped) > 5 else "")
        dataset = replace(dataset, source=f"{dataset.source}; {len(skipped)} broken skipped: {shown}")
    if copies := len(train) - len(np.unique(train.rows)):
        dataset = replace(dataset, source=f"{dataset.source}; {copies} copies of others, in the same split as those")
    dataset = dataset.said_to_lack("test")
    if said := unread(others):
        dataset = replace(dataset, source=f"{dataset.source}; {said}")
    return dataset.checked()


def _decode(root: Path, files: Files, side: int, skip: bool, skipped: list[Path]) -> Split:
    paths = [image for images in files.values() for image in images]
    labels = np.repeat(np.arange(len(files)), [len(images) for images in files.values()])
    entries = [[str(p.relative_to(root)), *size_and_time(p)] for p in paths]
    key = {"format": FORMAT, "root": str(root.resolve()), "side": side, "files": entries} | (
        {"skip": 1} if skip else {}
    )

    def decode(allocate: Allocate) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        broken = decode_images(paths, allocate(len(paths), side), skip=skip)
        if len(broken) > MOST_BROKEN * len(paths):
            raise DataError(
                f"at most {MOST_BROKEN:.0%} of the images may be broken and skipped, but {len(broken)} of "
                f"{len(paths)} are, first: {next(iter(broken.values()))}. `petune data check {root}` lists them all"
            )
        marked = labels.copy()
        marked[list(broken)] = SKIPPED
        return marked, _rows(paths)

    split = decoded(key, decode, CROP)
    gone = split.labels == SKIPPED
    skipped += [paths[i] for i in np.flatnonzero(gone)]
    return split.take(np.flatnonzero(~gone)) if gone.any() else split


def _rows(paths: Sequence[Path]) -> NDArray[np.int64]:
    """Where each image lies: a copy, byte for byte, where the first one does; no split is cut between them."""
    by_size: dict[int, list[int]] = defaultdict(list)
    for i, path in enumerate(paths):
        by_size[size_and_time(path)[0]].append(i)
    rows = np.arange(len(paths))
    for alike in (several for several in by_size.values() if len(several) > 1):
        first: dict[bytes, int] = {}
        for i in alike:
            with contextlib.suppress(OSError), paths[i].open("rb") as file:
                rows[i] = first.setdefault(hashlib.file_digest(file, "sha256").digest(), i)
    return rows
