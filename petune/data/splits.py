"""Split folders of a folder dataset: find them by their common names; never take a split for a class."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from petune.base.errors import DataError
from petune.data.find_images import has_subfolders, visible_subfolders
from petune.data.images import supported_suffixes

SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev", "development"),
    "test": ("test", "testing", "eval", "evaluation", "holdout", "heldout"),
}
"""Split to the names of its folder, without case and separators; the names are those of Hugging Face datasets."""
MAX_SHOWN = 5


def split_of(folder_name: str) -> str | None:
    """Return the split that a folder name means (`Hold-out` is test, `train_set` is train), or None."""
    plain = re.sub(r"[-_ .]", "", folder_name.casefold())
    names = {plain, plain.removesuffix("set")}
    return next((split for split, known in SPLIT_NAMES.items() if names.intersection(known)), None)


def named_splits(path: Path) -> dict[str, Path]:
    """Return the folder of each split that has one; empty if the folder holds class folders only.

    Raises:
        DataError: A split has images but no class folders, or two folders.
    """
    splits: dict[str, list[Path]] = {}
    for folder in visible_subfolders(path):
        split = split_of(folder.name)
        if split is not None:
            splits.setdefault(split, []).append(folder)
    folders = [folder for named in splits.values() for folder in named]
    if not any(map(has_subfolders, folders)):
        _check_not_loose(path)
        return {}
    loose = [folder for folder in folders if not has_subfolders(folder)]
    if loose:
        raise DataError(_loose_message(path, loose))
    for split, named in splits.items():
        if len(named) > 1:
            raise DataError(f"{path} has more than one {split} folder: {_names(named)}. Merge them, or move one away")
    return {split: splits[split][0] for split in ("train", "test", "val") if split in splits}


def split_folders(path: Path) -> dict[str, Path]:
    """Return the folder of each split; a folder of class folders is all `train`.

    Raises:
        DataError: There is no such folder, its splits have unknown names, or they have no class folders.
    """
    check_is_folder(path)
    splits = named_splits(path)
    if splits and "train" not in splits:
        name = next(iter(splits.values())).name
        raise DataError(
            f"{path} has {name}/ but no class folders in train/. Add train/CLASS/*. If {name} is a class, put all "
            "class folders into train/"
        )
    similar = _similar_to_splits(folder for folder in visible_subfolders(path) if folder not in splits.values())
    if len(similar) > (0 if splits else 1):
        raise DataError(
            f"unknown split folders in {path}: {_names(similar)}. Rename them to train/, val/ and test/, or move them "
            "away"
        )
    return splits or {"train": path}


def check_is_folder(path: Path) -> None:
    """Raise a DataError if `path` is not a folder."""
    if not path.exists():
        raise DataError(f"no such folder: {path}")
    if not path.is_dir():
        raise DataError(f"{path} is a file. folder:PATH takes a folder of class folders")


def left_out_note(path: Path) -> str:
    """Name what a folder dataset has outside its class folders, which is not read; empty if there is nothing."""
    splits = named_splits(path)
    used = set(splits.values())
    entries = [f"{folder.name}/" for folder in visible_subfolders(path) if splits and folder not in used]
    for folder in (path, *splits.values()):
        count = sum(_is_image(file) for file in folder.iterdir())
        if count:
            where = "outside class folders" if folder == path else f"directly in {folder.name}/"
            entries.append(f"{count} {'image' if count == 1 else 'images'} {where}")
    more = f" and {len(entries) - MAX_SHOWN} more" if len(entries) > MAX_SHOWN else ""
    return f"left out: {', '.join(entries[:MAX_SHOWN])}{more}" if entries else ""


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in supported_suffixes() and not file.name.startswith(".") and not file.is_dir()


def _check_not_loose(path: Path) -> None:
    """Refuse loose images in train/ and test/: they would become the classes `train` and `test`.

    Single classes may have such names (`bus` and `train`, `valid` and `invalid`).
    """
    folders = visible_subfolders(path)
    splits = {folder: split_of(folder.name.rstrip("0123456789")) for folder in folders}  # also test1, of Kaggle
    named = [folder for folder in folders if splits[folder]]
    kinds = {splits[folder] for folder in named}
    if named and (len(named) == len(folders) or ("train" in kinds and len(kinds) > 1)):
        raise DataError(
            f"{_loose_message(path, named)}. If {_names(named)} are classes, put all class folders into train/"
        )


def _loose_message(path: Path, folders: list[Path]) -> str:
    slashed = " and ".join(f"{folder.name}/" for folder in folders)
    sorted_into = " and ".join(f"{folder.name}/CLASS/" for folder in folders)
    return f"{path} has no class folders in {slashed}. Sort the images into {sorted_into}, or move them away"


def _similar_to_splits(folders: Iterable[Path]) -> list[Path]:
    """Return folders of class folders that look like splits, such as seg_train/ and seg_test/."""
    parents = [folder for folder in folders if has_subfolders(folder)]
    return [folder for folder in parents if any(map(split_of, re.split("[^a-z]+", folder.name.casefold())))]


def _names(folders: list[Path]) -> str:
    return " and ".join(folder.name for folder in folders)
