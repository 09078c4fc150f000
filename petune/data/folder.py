"""Load your own images: a folder of class folders, with or without train, val and test above them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from petune.base.text import plural
from petune.data.band_files import form_of_all
from petune.data.bands import RGB, ImageForm
from petune.data.cache import CACHE_GB, Allocate, Fallback, cached_split
from petune.data.copies import copies_note, rows_of_copies
from petune.data.dataset import CUT_TEST_NOTE, MAX_BROKEN, Dataset, OnBroken, Split, Target
from petune.data.doubtful_classes import names_of_splits_note
from petune.data.find_images import size_and_time, skipped_note
from petune.data.images import decode_image, decode_images, refuse_broken
from petune.data.layout import ClassFiles, list_images
from petune.data.on_request import on_request_note, scratch
from petune.data.splits import left_out_note

FORMAT = 3
"""Raised when the same files are decoded to other pixels, so that decoded caches are rebuilt."""
CROP = 0.875  # timm's usual share of the side for evaluation; the rest is stored as a margin
BROKEN_LABEL = -1


def load_folder(
    path: Path,
    image_size: int,
    on_broken: OnBroken = "error",
    cache_gb: float = CACHE_GB,
    max_broken: float = MAX_BROKEN,
) -> Dataset:
    """Load PATH/train/CLASS/*, PATH/val/CLASS/*, PATH/test/CLASS/*, or PATH/CLASS/*.

    Missing splits are cut from train. If there is only val/, it is used for testing, as in ImageNet. The test split
    that is cut is a fixed, stratified fifth; `Dataset.with_val` cuts val.

    Args:
        path: The folder.
        image_size: Side, in pixels, at which the images will be used; they are stored with a margin around it.
        on_broken: What to do with an image that cannot be decoded. `skip` leaves it out and names it in `source`; more
            than `max_broken` of a split is an error.
        cache_gb: Splits whose decoded images are larger, in 10⁹ bytes, are decoded each time they are read.
        max_broken: Share of a split.

    Raises:
        DataError: No images, fewer than two classes, an empty class, classes that differ between splits, or an image
            that cannot be decoded (with its path).
    """
    files, skipped = list_images(path)
    form = form_of_all([file for classes in files.values() for images in classes.values() for file in images])
    decoder = _Decoder(path, math.ceil(image_size / CROP), max_broken if on_broken == "skip" else None, cache_gb, form)
    splits: dict[str, Split] = {}
    broken: list[Path] = []
    for part, classes in files.items():
        splits[part], bad = decoder.decode(classes)
        broken += bad
    dataset = with_splits(f"folder:{path}", path, tuple(files["train"]), splits)
    num_copies = len(splits["train"]) - len(np.unique(splits["train"].rows))
    notes = (
        _broken_note(path, broken),
        f"{plural(num_copies, 'copy', 'copies')} of other images, kept in the same split" if num_copies else "",
        *(_other_class_note(split, path) for split in splits.values()),
        copies_note({_used_as(part, files): [*chain(*classes.values())] for part, classes in files.items()}, path),
        dataset.missing_classes_note("test"),
        skipped_note(skipped),
        left_out_note(path),
        names_of_splits_note(dataset.classes),
        on_request_note(splits),
    )
    for note in notes:
        dataset = dataset.with_note(note)
    return dataset.validated()


def with_splits(name: str, path: Path, classes: tuple[str, ...], splits: Mapping[str, Split]) -> Dataset:
    """Use the splits that a folder has, and cut test from train if it has neither test nor val."""
    train = splits["train"]
    empty = train.take(np.arange(0))
    dataset = Dataset(name, Target("class", classes), str(path), "crop", train, empty, empty)
    if "test" in splits:
        return replace(dataset, val=splits.get("val", empty), test=splits["test"])
    if "val" in splits:
        return replace(
            dataset, test=splits["val"], source=f"{path} (val is used for testing, and another val is cut from train)"
        )
    return replace(dataset.with_test(), source=f"{path}{CUT_TEST_NOTE}")


def _used_as(part: str, parts: Collection[str]) -> str:
    """Return `test` for a val folder that is used for testing."""
    return "test" if part == "val" and "test" not in parts else part


def _other_class_note(split: Split, path: Path) -> str:
    """Warn of copies of an image in another class; empty if there are none."""
    assert split.names is not None
    first: dict[int, int] = {}
    pairs = [(i, first.setdefault(row, i)) for i, row in enumerate(split.rows.tolist())]
    found = [(i, j) for i, j in pairs if split.targets[i] != split.targets[j]]
    if not found:
        return ""
    copy, original = (Path(str(split.names[i])).relative_to(path) for i in found[0])
    are = "copy of an image is" if len(found) == 1 else "copies of images are"
    return f"warning: {len(found)} {are} in another class, such as {copy} and {original}"


def _broken_note(path: Path, broken: Sequence[Path]) -> str:
    shown = ", ".join(str(file.relative_to(path)) for file in broken[:5]) + (", …" if len(broken) > 5 else "")
    return f"{plural(len(broken), 'broken image')} skipped: {shown}" if broken else ""


@dataclass(frozen=True)
class _Decoder:
    """Decodes the splits of one folder.

    Attributes:
        root: The folder.
        side: Side of the stored images, in pixels.
        max_broken: Share of a split that may be left out because it cannot be decoded; None if nothing may.
        cache_gb: Largest size of the decoded images of a split in the cache, in 10⁹ bytes.
        form: Channels and type of all images.
    """

    root: Path
    side: int
    max_broken: float | None
    cache_gb: float
    form: ImageForm

    def decode(self, classes: ClassFiles) -> tuple[Split, list[Path]]:
        """Return a split, and the files that were left out."""
        paths = [image for images in classes.values() for image in images]
        labels = np.repeat(np.arange(len(classes)), [len(images) for images in classes.values()])
        fallback = Fallback(lambda row: decode_image(paths[row], self.side, self.form), self.cache_gb)

        def fill(allocate: Allocate) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
            return self._fill(paths, labels, allocate)

        def is_current(stored: Split) -> bool:
            return self._are_broken([paths[i] for i in np.flatnonzero(stored.targets == BROKEN_LABEL)])

        split = cached_split(self._key(paths), fill, CROP, fallback, is_current)
        split = replace(split, names=np.array([str(path) for path in paths]))
        is_broken = split.targets == BROKEN_LABEL
        if not is_broken.any():
            return split, []
        return split.take(np.flatnonzero(~is_broken)), [paths[i] for i in np.flatnonzero(is_broken)]

    def _are_broken(self, paths: Sequence[Path]) -> bool:
        """Return True if none of these images can be decoded: what was wrong may have been the mode of a file."""
        if not paths:
            return True
        shape = (len(paths), self.side, self.side, self.form.channels)
        return len(decode_images(paths, scratch(shape, self.form.dtype), form=self.form)) == len(paths)

    def _key(self, paths: Sequence[Path]) -> dict[str, object]:
        files = [[str(path.relative_to(self.root)), *size_and_time(path)] for path in paths]
        key = {"format": FORMAT, "root": str(self.root.resolve()), "side": self.side, "files": files}
        form = {} if self.form == RGB else {"channels": self.form.channels, "dtype": self.form.dtype}
        skip = {} if self.max_broken is None else {"skip": 1 if self.max_broken == MAX_BROKEN else self.max_broken}
        return key | form | skip

    def _fill(
        self, paths: Sequence[Path], labels: NDArray[np.int64], allocate: Allocate
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        out = allocate(len(paths), self.side, self.form.channels, self.form.dtype)
        broken = decode_images(paths, out, form=self.form)
        refuse_broken([*broken.values()], len(paths), self.max_broken, str(self.root))
        marked = labels.copy()
        marked[list(broken)] = BROKEN_LABEL
        return marked, rows_of_copies(paths)
