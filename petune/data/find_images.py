"""Find image or video files below a folder. Hidden files are ignored; links are followed, but never upwards."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from petune.base.errors import DataError
from petune.base.text import plural
from petune.data.images import UNSUPPORTED_SUFFIXES, heic_advice, supported_suffixes
from petune.data.video.decode import ANIMATED_SUFFIXES, VIDEO_SUFFIXES

COMPANION_SUFFIXES = frozenset(
    [".aac", ".csv", ".db", ".htm", ".html", ".ini", ".json", ".jsonl", ".log", ".m4a", ".md", ".mp3", ".srt", ".tsv",
     ".txt", ".vtt", ".wav", ".xml", ".yaml", ".yml"]
)  # fmt: skip
"""Files that accompany images and videos, such as annotations and sound; nobody expects them to be read."""
MAX_SHOWN = 5


@dataclass(frozen=True)
class FileKind:
    """Kind of the files of a dataset.

    Attributes:
        noun: The word for one.
        dataset: The dataset of class folders with such files.
        example: A suffix.
        suffixes: Return those that are read.
    """

    noun: str
    dataset: str
    example: str
    suffixes: Callable[[], frozenset[str]]


IMAGES = FileKind("image", "folder", ".jpg", supported_suffixes)
VIDEOS = FileKind("video", "video", ".mp4", lambda: VIDEO_SUFFIXES | ANIMATED_SUFFIXES)


def find_images(
    folder: Path, skipped: Counter[str] | None = None, *, unsupported: bool = False, kind: FileKind = IMAGES
) -> list[Path]:
    """Return every image (or video) in a folder and its subfolders, ordered by path.

    Args:
        folder: Where to look.
        skipped: Counts the other visible files by suffix.
        unsupported: Include image formats that petune cannot read, so that they can be reported.
        kind: Which files are found.

    Raises:
        DataError: A folder cannot be listed, so its images would be missing.
    """
    suffixes = kind.suffixes() | UNSUPPORTED_SUFFIXES if unsupported else kind.suffixes()
    images = []
    for file in _files_below(folder, _refuse_unlisted):
        suffix = file.suffix.lower()
        if suffix in suffixes:
            images.append(file)
        elif skipped is not None:
            skipped[suffix] += 1
    return sorted(images)


def visible_subfolders(path: Path) -> list[Path]:
    """Return the folders in a folder, sorted, without hidden ones."""
    return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def has_subfolders(path: Path) -> bool:
    """Return True if `path` is a folder with visible folders in it."""
    return path.is_dir() and bool(visible_subfolders(path))


def has_images(folder: Path, *, below: bool = True) -> bool:
    """Return True if there is an image or a video in a folder or, unless `below` is False, in its subfolders."""
    files = (
        _files_below(folder, lambda error: None)
        if below
        else (file for file in folder.iterdir() if not file.name.startswith("."))
    )
    suffixes = supported_suffixes() | UNSUPPORTED_SUFFIXES | VIDEO_SUFFIXES
    return any(file.suffix.lower() in suffixes and not file.is_dir() for file in files)


def size_and_time(path: Path) -> tuple[int, int]:
    """Return the size of a file in bytes and its modification time in ns; zeros for a dangling link."""
    with contextlib.suppress(OSError):  # decoding reports the file
        stat = path.stat()
        return stat.st_size, stat.st_mtime_ns
    return 0, 0


def skipped_note(counts: Mapping[str, int], kind: FileKind = IMAGES) -> str:
    """Name the files that are not read, other than annotations and the like; empty if there are none.

    Args:
        counts: Number of skipped files by suffix.
        kind: Which files are read.
    """
    unsupported = UNSUPPORTED_SUFFIXES if kind == IMAGES else frozenset()
    formats = [f"{count:,} {suffix}" for suffix, count in counts.items() if suffix in unsupported]
    advice = f"convert them{heic_advice(counts)}"
    notes = [f"{', '.join(formats)} skipped (unsupported format; {advice})"] if formats else []
    others = Counter({k: n for k, n in sorted(counts.items()) if k not in unsupported | COMPANION_SUFFIXES})
    if others:
        shown = ", ".join(
            f"{count:,} {suffix or 'without a suffix'}" for suffix, count in others.most_common(MAX_SHOWN)
        )
        more = ", …" if len(others) > MAX_SHOWN else ""
        notes.append(f"{plural(others.total(), 'file')} left out, not read as {kind.noun}s: {shown}{more}")
    return "; ".join(notes)


def _files_below(folder: Path, on_unlisted: Callable[[OSError], None]) -> Iterator[Path]:
    """Yield every visible file; a link to a folder that contains it is not followed."""
    ancestors = {_identity(path) for path in Path(os.path.abspath(folder)).parents}
    pending = [(folder, ancestors)]
    while pending:
        current, ancestors = pending.pop()
        identity = _identity(current)
        if identity is None or identity in ancestors:
            continue
        try:
            with os.scandir(current) as found:
                entries = [entry for entry in found if not entry.name.startswith(".")]
        except OSError as error:
            on_unlisted(error)
            continue
        for entry in entries:
            if _is_folder(entry):
                pending.append((Path(entry.path), ancestors | {identity}))
            else:
                yield Path(entry.path)


def _refuse_unlisted(error: OSError) -> None:
    raise DataError(
        f"cannot list {error.filename}: {error.strerror}. Make it readable, or move it out of the dataset"
    ) from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    with contextlib.suppress(OSError):  # a link that leads nowhere: decoding reports it
        return entry.is_dir()
    return False


def _identity(path: Path) -> tuple[int, int] | None:
    with contextlib.suppress(OSError):
        stat = path.stat()
        return stat.st_dev, stat.st_ino
    return None
