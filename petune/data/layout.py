"""List the images of a folder dataset: class folders, with or without train, val and test above them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

from petune.base.errors import DataError, UsageError
from petune.base.text import plural
from petune.data.find_images import (
    IMAGES,
    VIDEOS,
    FileKind,
    find_images,
    has_subfolders,
    skipped_note,
    visible_subfolders,
)
from petune.data.splits import check_is_folder, left_out_note, named_splits, split_folders

ClassFiles = Mapping[str, list[Path]]
"""Class name to its images, both in order."""


def list_images(path: Path, kind: FileKind = IMAGES) -> tuple[dict[str, ClassFiles], dict[str, int]]:
    """List the images (or videos) of a folder dataset by split and class, as `load_folder` reads them.

    Args:
        path: The folder.
        kind: Which files are listed.

    Returns:
        The images, and the number of visible files that are not read as images, by suffix.

    Raises:
        DataError: As `load_folder`, except for what decoding would find.
    """
    skipped = Counter[str]()
    splits = {part: _class_files(folder, skipped, kind) for part, folder in split_folders(path).items()}
    _check_classes(path, splits, skipped, kind)
    return splits, dict(sorted(skipped.items()))


def list_split(path: Path, part: str, kind: FileKind = IMAGES) -> tuple[str, ClassFiles, str]:
    """List the images to evaluate on: PATH/test or PATH/val, or the whole folder if it has no splits.

    As in `load_folder`, val is the test split of a folder that has no other.

    Returns:
        The split (`all` if the folder has none), its images, and a note about what is not read.

    Raises:
        DataError: There is no such folder, it has no images, or a class folder is empty.
        UsageError: The folder has splits, but not this one.
    """
    check_is_folder(path)
    splits = named_splits(path)
    if "val" in splits:
        splits.setdefault("test", splits["val"])
    if part not in splits and splits.keys() - {"train"}:
        raise UsageError(
            f"{path} has no {part} split; it has {' and '.join(splits)}", cli_hint="Choose one with --split"
        )
    skipped = Counter[str]()
    files = _class_files(splits.get(part, splits.get("train", path)), skipped, kind)
    label = part if part in splits else "all"
    _check_not_empty(path, {label: files}, skipped, kind)
    return label, files, "; ".join(filter(None, (skipped_note(skipped, kind), left_out_note(path, kind))))


def _class_files(folder: Path, skipped: Counter[str], kind: FileKind) -> ClassFiles:
    return {subfolder.name: find_images(subfolder, skipped, kind=kind) for subfolder in visible_subfolders(folder)}


def _check_not_empty(path: Path, splits: Mapping[str, ClassFiles], skipped: Mapping[str, int], kind: FileKind) -> None:
    if not any(images for classes in splits.values() for images in classes.values()):
        note = _other_kind(path, skipped, kind) or skipped_note(skipped, kind)
        raise DataError(
            f"no {kind.noun}s in {path}. Expected CLASS/*{kind.example} or train/CLASS/*{kind.example} (supported: "
            f"{', '.join(sorted(kind.suffixes()))}){f'; {note}' if note else ''}"
        )
    for part, classes in splits.items():
        empty = [name for name, images in classes.items() if not images]
        if empty:
            raise DataError(
                f"no {kind.noun}s in class folder {', '.join(empty[:5])} ({part} of {path}). Add {kind.noun}s, or "
                "remove the folder"
            )


def _other_kind(path: Path, skipped: Mapping[str, int], kind: FileKind) -> str:
    """Name the dataset that reads what a folder has instead; empty if it has neither images nor videos."""
    for other in (IMAGES, VIDEOS):
        count = sum(number for suffix, number in skipped.items() if suffix in other.suffixes())
        if other != kind and count:
            return f"it has {plural(count, other.noun)}: use {other.dataset}:{path}"
    return ""


def _check_classes(path: Path, splits: Mapping[str, ClassFiles], skipped: Mapping[str, int], kind: FileKind) -> None:
    for name in dict.fromkeys(name for classes in splits.values() for name in classes):
        if name.encode(errors="replace").decode() != name:  # no result file could hold it
            raise DataError(f"the name of class folder {name!a} in {path} is not UTF-8. Rename it")
    _check_not_empty(path, splits, skipped, kind)
    train = set(splits["train"])
    for part, classes in splits.items():
        absent = [
            f"{split} has no {', '.join(names[:5])}"
            for split, names in ((part, sorted(train - set(classes))), ("train", sorted(set(classes) - train)))
            if names
        ]
        if absent:
            raise DataError(f"the splits of {path} have different classes: {' and '.join(absent)}")
    if len(train) < 2:
        raise DataError(
            f"only one class folder in {path}: {', '.join(train)}. At least two are needed{_hint(path, train)}"
        )


def _hint(path: Path, classes: Collection[str]) -> str:
    """Return advice for a folder around all class folders."""
    around = [path / name for name in classes if has_subfolders(path / name)]
    return f". If the class folders are in {around[0]}, use folder:{around[0]}" if around else ""
