"""Check a folder of images before training: broken files, and the same image in two splits or classes."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from petune.data.images import decode_images
from petune.data.layout import ClassFiles, list_images
from petune.data.splits import left_out_note


@dataclass
class FolderReport:
    """Contents and problems of a folder dataset.

    Attributes:
        images: Number of images by split and class.
        broken: A message for each image that cannot be decoded.
        in_two_splits: Pairs of byte-for-byte equal files in two splits, the earlier split second. They inflate the
            accuracy measured on the later split.
        in_two_classes: Pairs of equal files in two classes of one split; one label is wrong.
        too_few_for_test, too_few_for_val: Classes with too few different images to give one to the split, if that
            split will be cut from train.
        copies: Number of copies within one split and class; cutting never separates them.
        skipped: Number of visible files that are not read, by suffix.
        left_out: A note naming folders and images outside the class folders, which are not read; empty without any.
    """

    images: dict[str, dict[str, int]] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    in_two_splits: list[tuple[Path, Path]] = field(default_factory=list)
    in_two_classes: list[tuple[Path, Path]] = field(default_factory=list)
    too_few_for_test: list[str] = field(default_factory=list)
    too_few_for_val: list[str] = field(default_factory=list)
    copies: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    left_out: str = ""

    @property
    def is_sound(self) -> bool:
        """True if no file is broken, or in two splits or classes."""
        return not self.broken and not self.in_two_splits and not self.in_two_classes


@dataclass(frozen=True)
class _Seen:
    """The first file with certain bytes."""

    part: str
    name: str
    file: Path


def check_folder(path: Path) -> FolderReport:
    """Decode every image of a folder dataset and compare the files.

    Raises:
        DataError: The layout is wrong: see `petune.data.folder`.
    """
    splits, skipped = list_images(path)
    report = FolderReport(skipped=skipped, left_out=left_out_note(path))
    seen: dict[bytes, _Seen] = {}
    for part, classes in splits.items():
        report.images[part] = {name: len(files) for name, files in classes.items()}
        for name, files in classes.items():
            decoded = np.empty((len(files), 8, 8, 3), np.uint8)
            broken = decode_images(files, decoded, skip=True)
            report.broken += broken.values()
            for i, file in enumerate(files):
                if i not in broken:
                    _compare(_Seen(part, name, file), seen, report)
    _find_small_classes(splits, seen, report)
    return report


def _compare(image: _Seen, seen: dict[bytes, _Seen], report: FolderReport) -> None:
    """Record in the report whether a file equals an earlier one."""
    twin = seen.setdefault(hashlib.sha256(image.file.read_bytes()).digest(), image)
    if twin.part != image.part:
        report.in_two_splits.append((image.file, twin.file))
    elif twin.name != image.name:
        report.in_two_classes.append((image.file, twin.file))
    elif twin is not image:
        report.copies += 1


def _find_small_classes(splits: Mapping[str, ClassFiles], seen: Mapping[bytes, _Seen], report: FolderReport) -> None:
    different = Counter(image.name for image in seen.values() if image.part == "train")
    cuts_test = splits.keys() == {"train"}
    cuts_val = not {"val", "test"} <= splits.keys()
    if cuts_test:
        report.too_few_for_test = [name for name in splits["train"] if different[name] < 2]
    if cuts_val:
        report.too_few_for_val = [name for name in splits["train"] if different[name] < 2 + cuts_test]
