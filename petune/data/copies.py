"""Find files that are byte-for-byte copies of others: within a split, and of one split in another."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from petune.base.errors import CheckpointError
from petune.base.files import replace_file
from petune.base.text import plural
from petune.data.cache import cache_dir
from petune.data.find_images import size_and_time

SAMPLE = 4096
"""Bytes from the middle of a file. Most files of the same size differ there, and are not read any further."""


def rows_of_copies(paths: Sequence[Path]) -> NDArray[np.int64]:
    """Return the row of each file; byte-for-byte copies get the row of the first, so that no split separates them."""
    first: dict[Hashable, int] = {}
    return np.array([first.setdefault(key, i) for i, key in enumerate(content_keys(paths))], np.int64)


def content_keys(paths: Sequence[Path]) -> list[Hashable]:
    """Return a key for each file that only files with the same bytes share; one that cannot be read has its own.

    A key is the size and bytes that tell files of this size apart, or the number of an unreadable file as text.
    """
    sizes = [size_and_time(path)[0] for path in paths]
    keys: list[Hashable] = [(size, b"") for size in sizes]
    for read in (_sample, _digest):
        counts = Counter(keys)
        keys = [
            (sizes[i], read(path) or str(i)) if counts[key] > 1 else key
            for i, (path, key) in enumerate(zip(paths, keys, strict=True))
        ]
    return keys


def copies_note(splits: Mapping[str, Sequence[Path]], root: Path, noun: str = "image") -> str:
    """Describe the files of val and test that are also in train; empty if there are none.

    Args:
        splits: The files by split.
        root: The folder of all files, for the note.
        noun: The word for a file.
    """
    notes = []
    article = "an" if noun[0] in "aeiou" else "a"
    for part in ("val", "test"):
        copies = _copies(splits.get(part, ()), splits["train"])
        if copies:
            copy, original = (os.path.relpath(path, root) for path in copies[0])
            are = f"is a copy of {article} {noun}" if len(copies) == 1 else f"are copies of {noun}s"
            notes.append(
                f"warning: {plural(len(copies), noun)} of {part} {are} of train, such as {copy} and {original}"
            )
    return "; ".join(notes)


def _copies(files: Sequence[Path], others: Sequence[Path]) -> list[tuple[Path, Path]]:
    """Return the files with a copy among `others`; the answer is kept in the cache, because files have to be read."""
    if not files:
        return []
    stamps = {path: size_and_time(path) for path in (*files, *others)}
    sizes = {stamps[path][0] for path in files} & {stamps[path][0] for path in others}
    same_size = [[path for path in paths if stamps[path][0] in sizes] for paths in (files, others)]
    if not all(same_size):
        return []
    key = [[[str(path.absolute()), *stamps[path]] for path in paths] for paths in same_size]
    cached = cache_dir() / "copies" / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):  # not there, or damaged
        return [(Path(copy), Path(original)) for copy, original in json.loads(cached.read_text())]
    keys = content_keys([*same_size[0], *same_size[1]])
    originals: dict[Hashable, Path] = {}
    for contents, path in zip(keys[len(same_size[0]) :], same_size[1], strict=True):
        originals.setdefault(contents, path)
    pairs = zip(same_size[0], keys, strict=False)
    copies = [(path, originals[contents]) for path, contents in pairs if contents in originals]
    if any(_is_unread(key) for key in keys):  # it may have another mode in the next run
        return copies
    with contextlib.suppress(OSError, CheckpointError):  # it is found again in the next run
        replace_file(cached, json.dumps([[str(copy), str(original)] for copy, original in copies]).encode())
    return copies


def _is_unread(key: Hashable) -> bool:
    return isinstance(key, tuple) and isinstance(key[1], str)


def _sample(path: Path) -> bytes:
    """Return bytes from the middle of a file; empty if it cannot be read."""
    with contextlib.suppress(OSError), path.open("rb", buffering=0) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - SAMPLE) // 2)
        return file.read(SAMPLE)
    return b""


def _digest(path: Path) -> bytes:
    """Return a digest of a file; empty if it cannot be read, which decoding reports."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
    return b""
