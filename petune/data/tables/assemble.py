"""Make a dataset of a table: decode its images and masks into the cache, and cut the splits."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from petune.base.text import plural
from petune.data.bands import ImageForm
from petune.data.cache import Allocate, Fallback, cached_split
from petune.data.cut import Samples
from petune.data.dataset import CUT_TEST_NOTE, MAX_BROKEN, Dataset, Split, Target
from petune.data.find_images import IMAGES, VIDEOS, FileKind, size_and_time
from petune.data.folder import BROKEN_LABEL, CROP
from petune.data.images import refuse_broken
from petune.data.on_request import on_request_note
from petune.data.reader import ReadContext
from petune.data.tables.contents import ImageColumn, decode_column, decode_content, unlisted_files
from petune.data.tables.masks import decode_masks, is_mask
from petune.data.tables.plan import Plan
from petune.data.tables.table import listed
from petune.data.tables.videos import clips_of, finished, has_videos, look_at_videos

FORMAT = 2
"""Raised when the same contents are decoded to other pixels, so that decoded caches are rebuilt."""
Rows = NDArray[np.int64]


def load_plan(plan: Plan, name: str, context: ReadContext) -> Dataset:
    """Load a dataset.

    Args:
        plan: The table and its columns.
        name: The dataset as it is written on the command line.
        context: See `ReadContext`.

    Raises:
        DataError: A file is missing, an image is broken, a mask does not fit.
    """
    files = plan.images.files
    max_broken = context.max_broken if context.on_broken == "skip" else None
    loader = _Loader(plan, math.ceil(context.image_size / CROP), max_broken, context.cache_gb)
    videos = look_at_videos(plan, context) if has_videos(plan) else None
    images = loader.images() if videos is None else clips_of(plan, videos, context)
    if plan.columns.kind == "mask":
        masks, target = loader.masks()
        samples = _Samples(plan, target, masks.images[..., 0], images)
        broken = np.union1d(_broken(images), _broken_masks(masks))
    else:
        samples = _Samples(plan, plan.encoded.target, plan.encoded.targets, images)
        broken = _broken(images)
    dataset = samples.dataset(name, broken)
    notes = (
        plan.note,
        _found_classes_note(plan, samples.target) if plan.columns.kind == "mask" else "",
        "" if plan.columns.kind == "mask" else plan.encoded.note,
        samples.broken_note(broken),
        samples.copies_note(),
        on_request_note({"images": images}),
        dataset.missing_classes_note("test"),
        "" if files is None else _unlisted_note(plan, files, IMAGES if videos is None else VIDEOS),
    )
    for note in notes:
        dataset = dataset.with_note(note)
    return dataset if videos is None else finished(dataset, plan, videos, context)


@dataclass(frozen=True)
class _Loader:
    """Decodes the columns of one table.

    Attributes:
        plan: The table.
        side: Side of the stored images, in pixels.
        max_broken: Largest share of images that are left out because they cannot be decoded; None raises for the first.
        cache_gb: Largest size of decoded files in the cache; images that are in the table itself are always cached.
    """

    plan: Plan
    side: int
    max_broken: float | None
    cache_gb: float

    def images(self) -> Split:
        """Return all images; targets are 0, or `BROKEN_LABEL` where one cannot be decoded."""
        files, form = self.plan.images.files, self.plan.images.form
        fallback = (
            None if files is None else Fallback(lambda row: decode_content(files[row], self.side, form), self.cache_gb)
        )

        def is_current(stored: Split) -> bool:
            return files is None or not any(_decodes(files[row], self.side, form) for row in _broken(stored).tolist())

        return cached_split(self._key(self.plan.images, {}), self._fill_images, CROP, fallback, is_current)

    def masks(self) -> tuple[Split, Target]:
        """Return all masks as images of one channel, and the classes."""
        codes = self.plan.codes
        key = self._key(self.plan.masks, {"codes": codes.class_256.tolist(), "images": self._version(self.plan.images)})
        files = self.plan.masks.files

        def is_current(stored: Split) -> bool:
            return files is None or not any(is_mask(files[row]) for row in _broken_masks(stored).tolist())

        split = cached_split(key, self._fill_masks, CROP, is_current=is_current)
        names = codes.found_names(split.targets[split.rows == 0], self.plan.table.title)
        return split, Target("mask", names)

    def _key(self, column: ImageColumn, more: dict[str, Any]) -> dict[str, Any]:
        contents = self._version(column)
        skip = self.max_broken if self.max_broken not in (None, MAX_BROKEN) else self.max_broken is not None
        key = {"format": FORMAT, "contents": contents, "side": self.side, "skip": skip, **more}
        return key if column.files is not None else {**key, "column": column.name, "first": column.channels_first}

    def _version(self, column: ImageColumn) -> Any:
        """Return JSON that changes with the images: path, size and time of each file, or those of the table."""
        if column.files is None:
            return self.plan.table.version()
        return [[str(path.resolve()), *size_and_time(path)] for path in column.files]

    def _fill_images(self, allocate: Allocate) -> tuple[Rows, Rows]:
        form = self.plan.images.form
        out = allocate(len(self.plan.table), self.side, form.channels, form.dtype)
        decoded = decode_column(self.plan.images, out)
        self._check_number(decoded.broken)
        labels = np.zeros(len(out), np.int64)
        labels[list(decoded.broken)] = BROKEN_LABEL
        return labels, decoded.rows

    def _fill_masks(self, allocate: Allocate) -> tuple[Rows, Rows]:
        """Return the range of classes in each mask, and 1 for each that cannot be decoded."""
        out = allocate(len(self.plan.table), self.side, 1)
        ranges, broken = decode_masks(self.plan.masks, self.plan.images, self.plan.codes, out[..., 0])
        self._check_number(broken)
        return ranges, np.isin(np.arange(len(out)), list(broken)).astype(np.int64)

    def _check_number(self, broken: dict[int, str]) -> None:
        messages = [broken[row] for row in sorted(broken)]
        refuse_broken(messages, len(self.plan.table), self.max_broken, self.plan.table.title)


@dataclass(frozen=True)
class _Samples:
    """All rows of a table with decoded images.

    Attributes:
        plan: The table.
        target: Kind and names of the targets.
        targets: One per row; masks (N, S, S).
        images: All images; `rows` are those of the first copy.
    """

    plan: Plan
    target: Target
    targets: Any
    images: Split

    def dataset(self, name: str, broken: Rows) -> Dataset:
        """Return the dataset with the splits of the table, or with a test split that is cut from train."""
        splits = {part: self._split(np.setdiff1d(rows, broken)) for part, rows in self.plan.parts.items()}
        train = splits["train"]
        empty = train.take(np.arange(0))
        title = self.plan.table.title
        dataset = Dataset(name, self.target, title, "crop", train, empty, empty)
        if "test" in splits:
            return replace(dataset, val=splits.get("val", empty), test=splits["test"])
        if "val" in splits:
            return replace(
                dataset,
                test=splits["val"],
                source=f"{title} (val is used for testing, and another val is cut from train)",
            )
        return replace(dataset.with_test(), source=f"{title}{CUT_TEST_NOTE}")

    def broken_note(self, broken: Rows) -> str:
        """Name the images that were skipped."""
        shown = listed([self._name(row) for row in broken.tolist()], 5)
        return f"{plural(len(broken), f'broken {self._noun()}')} skipped: {shown}" if len(broken) else ""

    def _noun(self) -> str:
        return "image" if self.images.num_frames is None else "video"

    def copies_note(self) -> str:
        """Tell copies of images: how many, between which splits, and those with different targets."""
        first = self.images.rows
        copies = np.flatnonzero(first != np.arange(len(first)))
        if not len(copies):
            return ""
        part_of = np.full(len(first), "", dtype="<U5")
        for part, rows in self.plan.parts.items():
            part_of[rows] = part
        between = np.flatnonzero(part_of[first[copies]] != part_of[copies])
        where = f"{len(between)} of them in another split" if len(between) else "kept in the same split"
        notes = [f"{plural(len(copies), 'copy', 'copies')} of other {self._noun()}s, {where}"]
        different = [row for row in copies.tolist() if not np.array_equal(self.targets[row], self.targets[first[row]])]
        if different:
            row = different[0]
            notes.append(
                f"warning: {plural(len(different), 'copy has', 'copies have')} another target than the first one, such "
                f"as {self._name(row)} and {self._name(int(first[row]))}"
            )
        return "; ".join(notes)

    def _split(self, rows: Rows) -> Split:
        groups = self.plan.groups
        has_masks = self.target.kind == "mask"
        if has_masks and len(np.unique(self.images.rows)) < len(self.images.rows):
            groups = self._groups_of_copies()
        return Split(
            images=self.images.images,
            targets=self.targets if has_masks else self.targets[rows],
            rows=rows if has_masks else self.images.rows[rows],
            crop=CROP,
            weights=None if self.plan.weights is None else self.plan.weights[rows],
            groups=None if groups is None else groups[rows],
            names=np.array([self._name(row) for row in rows.tolist()], dtype=np.str_),
        )

    def _groups_of_copies(self) -> Rows:
        """Return groups in which copies of one split stay together, because each copy has a mask of its own."""
        part_of = np.zeros(len(self.images.rows), np.int64)
        for number, rows in enumerate(self.plan.parts.values()):
            part_of[rows] = number
        copies = self.images.rows * len(self.plan.parts) + part_of
        return copies if self.plan.groups is None else Samples("mask", copies, copies, self.plan.groups).units()

    def _name(self, row: int) -> str:
        return self.plan.row_names[row]


def _decodes(file: Path, side: int, form: ImageForm) -> bool:
    """Return True if an image can be decoded: one that could not may have got another mode or owner since."""
    try:
        decode_content(file, side, form)
    except Exception:  # Pillow raises a dozen types
        return False
    return True


def _broken(images: Split) -> Rows:
    return np.flatnonzero(images.targets == BROKEN_LABEL)


def _broken_masks(masks: Split) -> Rows:
    return np.flatnonzero(masks.rows == 1)


def _found_classes_note(plan: Plan, target: Target) -> str:
    """Tell how many classes the values of masks make, if they are not named: one stray pixel makes many."""
    if plan.codes.names is not None:
        return ""
    last = plan.codes.first_class + len(target.names) - 1
    return f"{len(target.names)} classes, because masks have values up to {last}; name them with classes=[a, b, …]"


def _unlisted_note(plan: Plan, files: list[Path], kind: FileKind) -> str:
    mask_files = (plan.masks.files or []) if plan.columns.kind == "mask" else []
    unlisted = unlisted_files([*files, *mask_files], kind)
    if not unlisted:
        return ""
    return f"{plural(len(unlisted), kind.noun)} next to those of the table not listed in it, such as {unlisted[0]}"
