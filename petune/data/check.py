"""Look through a folder of pictures before hours are spent on it: broken files, and the same picture in two splits."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from petune.data.images import decode_pictures
from petune.data.layout import picture_files


@dataclass(frozen=True)
class FolderReport:
    """What a folder holds.

    Attributes:
        pictures: Number of pictures by split and class.
        broken: Messages for those that cannot be decoded.
        shared: Pictures of another split than train whose file is equal, byte for byte, to one in train or in a
            split before theirs: what is measured on them is memory.
        doubtful: Likewise pictures of a split whose file is one of another class there, too: one label is wrong.
        untested, unvalidated: Classes that have too few different pictures to give one to the test or val split, where
            that will be cut from train.
        copies: How many are one of the same split and class; none of these is ever cut from what it is a copy of.
        left_out: Number of visible files that are not read, by what their names end in.
    """

    pictures: dict[str, dict[str, int]]
    broken: list[str]
    shared: list[tuple[Path, Path]]
    doubtful: list[tuple[Path, Path]]
    untested: list[str]
    unvalidated: list[str]
    copies: int
    left_out: dict[str, int]

    @property
    def is_sound(self) -> bool:
        """Whether nothing was found."""
        return not self.broken and not self.shared and not self.doubtful


def check_folder(path: Path) -> FolderReport:
    """Decode every picture of a folder dataset.

    Raises:
        DataError: The layout is wrong: see `petune.data.folder`.
    """
    found, left_out = picture_files(path)
    first_seen: dict[bytes, tuple[str, str, Path]] = {}
    shared: list[tuple[Path, Path]] = []
    doubtful: list[tuple[Path, Path]] = []
    copies = 0
    broken: list[str] = []
    pictures: dict[str, dict[str, int]] = defaultdict(dict)
    for part, files in found.items():
        for name, paths in files.items():
            pictures[part][name] = len(paths)
            bad = decode_pictures(paths, np.empty((len(paths), 8, 8, 3), np.uint8), skip=True)
            broken += bad.values()
            for file in (file for i, file in enumerate(paths) if i not in bad):
                digest = hashlib.sha256(file.read_bytes()).digest()
                where, kind, twin = first_seen.setdefault(digest, (part, name, file))
                if where != part:
                    shared.append((file, twin))
                elif kind != name:
                    doubtful.append((file, twin))
                else:
                    copies += twin != file
    different = Counter(name for part, name, _ in first_seen.values() if part == "train")
    cuts_test = pictures.keys() == {"train"}
    untested = [name for name in found["train"] if cuts_test and different[name] < 2]
    brings_val = {"val", "test"} <= pictures.keys()
    unvalidated = [name for name in found["train"] if not brings_val and different[name] < 2 + cuts_test]
    return FolderReport(dict(pictures), broken, shared, doubtful, untested, unvalidated, copies, left_out)
