"""Look through a folder of images before hours are spent on it: broken files, and the same image in two splits."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from petune.data.images import decode_images
from petune.data.layout import image_files


@dataclass(frozen=True)
class FolderReport:
    """What a folder holds.

    Attributes:
        images: Number of images by split and class.
        broken: Messages for those that cannot be decoded.
        shared: Images of another split than train whose file is equal, byte for byte, to one in train or in a
            split before theirs: what is measured on them is memory.
        doubtful: Likewise images of a split whose file is one of another class there, too: one label is wrong.
        untested, unvalidated: Classes that have too few different images to give one to the test or val split, where
            that will be cut from train.
        copies: How many are one of the same split and class; none of these is ever cut from what it is a copy of.
        left_out: Number of visible files that are not read, by what their names end in.
    """

    images: dict[str, dict[str, int]]
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
    """Decode every image of a folder dataset.

    Raises:
        DataError: The layout is wrong: see `petune.data.folder`.
    """
    found, left_out = image_files(path)
    first_seen: dict[bytes, tuple[str, str, Path]] = {}
    shared: list[tuple[Path, Path]] = []
    doubtful: list[tuple[Path, Path]] = []
    copies = 0
    broken: list[str] = []
    images: dict[str, dict[str, int]] = defaultdict(dict)
    for part, files in found.items():
        for name, paths in files.items():
            images[part][name] = len(paths)
            bad = decode_images(paths, np.empty((len(paths), 8, 8, 3), np.uint8), skip=True)
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
    cuts_test = images.keys() == {"train"}
    untested = [name for name in found["train"] if cuts_test and different[name] < 2]
    brings_val = {"val", "test"} <= images.keys()
    unvalidated = [name for name in found["train"] if not brings_val and different[name] < 2 + cuts_test]
    return FolderReport(dict(images), broken, shared, doubtful, untested, unvalidated, copies, left_out)
