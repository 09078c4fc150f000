"""Manifest of a dataset's files. The val and test splits depend on them, so a changed folder must not be resumed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from petune.base.text import plural
from petune.data.find_images import size_and_time

SAMPLE = 8 * 2**20
"""Bytes at the start and at the end of a large file that its digest depends on."""
Manifest = dict[str, dict[str, str]]
"""Split, then class, to the number of images and a digest of their names and sizes, such as `61 3f0c…`."""


def digests(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return one digest per split of a manifest, for the record."""
    return {part: digest(classes) for part, classes in manifest.items()}


def changes(before: Mapping[str, Any], now: Manifest) -> str:
    """Describe the first three differences between two manifests; empty if there is none."""
    differences = []
    for part in dict.fromkeys([*before, *now]):
        old, new = before.get(part, {}), now.get(part, {})
        for name in dict.fromkeys([*old, *new]):
            if old.get(name) != new.get(name):
                differences.append(f"{part}/{name} {_change(str(old.get(name, '0')), new.get(name, '0'))}")
    more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
    return ", ".join(differences[:3]) + more


def _change(old: str, new: str) -> str:
    old_count, new_count = old.split()[0], new.split()[0]
    return (
        f"had {plural(int(old_count), 'image')}, has {new_count}{' different ones' if old_count == new_count else ''}"
    )


def file_entry(images: Sequence[Path], folder: Path) -> str:
    """Return the entry of a class: the number of images and a digest of their names below `folder` and sizes."""
    files = [(name_below(path, folder), size_and_time(path)[0]) for path in images]
    return f"{len(images)} {digest(files)}"


def name_below(path: Path, folder: Path) -> str:
    """Return the path of a file below a folder, or its absolute path if it is elsewhere, as lists may name files."""
    absolute, root = Path(os.path.abspath(path)), os.path.abspath(folder)
    return str(absolute.relative_to(root) if absolute.is_relative_to(root) else absolute)


def file_digest(path: Path) -> str:
    """Return a short digest of a file's contents: of a large file, of its size, start and end.

    Parquet and Arrow files end with sizes and statistics of everything before.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= 2 * SAMPLE:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
        start = file.read(SAMPLE)
        file.seek(-SAMPLE, os.SEEK_END)
        return hashlib.sha256(b"%d" % size + start + file.read()).hexdigest()[:16]


def digest(value: Any) -> str:
    """Return a short digest of JSON data."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
