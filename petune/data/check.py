"""Look through a folder of pictures before hours are spent on it: broken files, and the same picture in two splits."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from petune.data.layout import picture_files
from petune.data.pictures import decode_pictures


@dataclass(frozen=True)
class FolderReport:
    """What a folder holds.

    Attributes:
        pictures: Number of pictures by split and class.
        broken: Messages for those that cannot be decoded.
        shared: Pictures of another split than train whose file is equal, byte for byte, to one in train or in a
            split before theirs: what is measured on them is memory.
        left_out: Number of visible files that are not read, by what their names end in.
    """

    pictures: dict[str, dict[str, int]]
    broken: list[str]
    shared: list[tuple[Path, Path]]
    left_out: dict[str, int]

    @property
    def is_sound(self) -> bool:
        """Whether nothing was found."""
        return not self.broken and not self.shared


def check_folder(path: Path) -> FolderReport:
    """Decode every picture of a folder dataset.

    Raises:
        DataError: The layout is wrong: see `petune.data.folder`.
    """
    found, left_out = picture_files(path)
    first_seen: dict[bytes, tuple[str, Path]] = {}
    shared: list[tuple[Path, Path]] = []
    broken: list[str] = []
    pictures: dict[str, dict[str, int]] = defaultdict(dict)
    for part, files in found.items():
        for name, paths in files.items():
            pictures[part][name] = len(paths)
            bad = decode_pictures(paths, np.empty((len(paths), 8, 8, 3), np.uint8), skip=True)
            broken += bad.values()
            for file in (file for i, file in enumerate(paths) if i not in bad):
                digest = hashlib.sha256(file.read_bytes()).digest()
                where, twin = first_seen.setdefault(digest, (part, file))
                if where != part:
                    shared.append((file, twin))
    return FolderReport(dict(pictures), broken, shared, left_out)
