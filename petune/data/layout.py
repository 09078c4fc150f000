"""Layout of a folder dataset: class folders, with or without train, val and test above them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from petune.base.config import expand_home
from petune.base.errors import DataError, UsageError
from petune.data.find_images import find_images, has_subfolders, unsupported_note, visible_subfolders
from petune.data.images import supported_suffixes

VAL_NAMES = ("val", "valid", "validation")
SPLIT_NAMES = {"train", "training", "test", "testing", *VAL_NAMES}

ClassFiles = Mapping[str, list[Path]]
"""Class name to its images, both in order."""


def folder_path(dataset: str) -> Path:
    """Return the PATH of `folder:PATH`, with `~` expanded."""
    return expand_home(dataset.removeprefix("folder:"))


def list_images(path: Path) -> tuple[dict[str, ClassFiles], dict[str, int]]:
    """List the images of a folder dataset by split and class, as `load_folder` reads them.

    Returns:
        The images, and the number of visible files that are not read as images, by suffix.

    Raises:
        DataError: As `load_folder`, except for what decoding would find.
    """
    skipped = Counter[str]()
    splits = {part: _class_files(folder, skipped) for part, folder in split_folders(path).items()}
    _check_classes(path, splits)
    return splits, dict(sorted(skipped.items()))


def list_split(path: Path, part: str) -> tuple[str, ClassFiles, str]:
    """List the images to evaluate on: PATH/test or PATH/val, or the whole folder if it has no splits.

    As in `load_folder`, val is the test split of a folder that has no other.

    Returns:
        The split (`all` if the folder has none), its images, and a note about skipped images.

    Raises:
        DataError: There is no such folder, it has no images, or a class folder is empty.
        UsageError: The folder has splits, but not this one.
    """
    _check_is_folder(path)
    names = {"train": ("train",), "val": VAL_NAMES, "test": ("test",)}
    splits = {split: path / name for split, aliases in names.items() for name in aliases if has_subfolders(path / name)}
    if "val" in splits:
        splits.setdefault("test", splits["val"])
    if part not in splits and splits.keys() - {"train"}:
        raise UsageError(
            f"{path} has no {part} split; it has {' and '.join(splits)}", cli_hint="Choose one with --split"
        )
    skipped = Counter[str]()
    files = _class_files(splits.get(part, splits.get("train", path)), skipped)
    label = part if part in splits else "all"
    _check_not_empty(path, {label: files})
    return label, files, unsupported_note(skipped)


def split_folders(path: Path) -> dict[str, Path]:
    """Return the folder of each split; a folder of class folders is all `train`.

    Raises:
        DataError: There is no such folder, or its splits have other names.
    """
    _check_is_folder(path)
    train = path / "train"
    if not has_subfolders(train):  # if a class is named train, its folder holds only images
        _check_without_train(path)
        return {"train": path}
    _check_other_splits(path)
    val_folders = [path / name for name in VAL_NAMES if (path / name).is_dir()]
    if len(val_folders) > 1:
        names = " and ".join(folder.name for folder in val_folders)
        raise DataError(f"{path} has more than one validation folder: {names}. Merge them")
    folders = {"train": train, "test": path / "test", "val": val_folders[0] if val_folders else path / "val"}
    return {part: folder for part, folder in folders.items() if folder.is_dir()}


def _check_is_folder(path: Path) -> None:
    if not path.exists():
        raise DataError(f"no such folder: {path}")
    if not path.is_dir():
        raise DataError(f"{path} is a file. folder:PATH takes a folder of class folders")


def _check_without_train(path: Path) -> None:
    """Refuse a test or val folder without train, and splits with other names."""
    lonely = [name for name in ("test", *VAL_NAMES) if has_subfolders(path / name)]
    if lonely:
        raise DataError(
            f"{path} has {lonely[0]}/ but no class folders in train/. Add train/CLASS/*, or put the class folders "
            "directly into it"
        )
    renamed = _renamed_splits(path)
    if renamed:
        names = ", ".join(folder.name for folder in renamed)
        raise DataError(
            f"unknown split folders in {path}: {names}. Rename them to train/, val/ and test/, or move them away"
        )


def _check_other_splits(path: Path) -> None:
    """Refuse a folder such as testing/ next to train/; it would be ignored, and val/ be used for testing."""
    known = {"train", "test", *VAL_NAMES}
    others = [
        folder.name
        for folder in visible_subfolders(path)
        if folder.name not in known and folder.name.casefold() in SPLIT_NAMES and has_subfolders(folder)
    ]
    if others:
        raise DataError(
            f"unknown split folder next to train/ in {path}: {', '.join(others)}. Rename it to val/ or test/, or move "
            "it away"
        )


def _renamed_splits(path: Path) -> list[Path]:
    """Return folders of class folders that look like splits, such as Train/ and Test/, or seg_train/ and seg_test/."""
    parents = [folder for folder in visible_subfolders(path) if has_subfolders(folder)]
    similar = [folder for folder in parents if SPLIT_NAMES.intersection(re.split("[^a-z]+", folder.name.casefold()))]
    certain = any(folder.name.casefold() in SPLIT_NAMES for folder in similar)
    return similar if len(similar) > 1 or certain else []


def _class_files(folder: Path, skipped: Counter[str]) -> ClassFiles:
    return {subfolder.name: find_images(subfolder, skipped) for subfolder in visible_subfolders(folder)}


def _check_not_empty(path: Path, splits: Mapping[str, ClassFiles]) -> None:
    if not any(images for classes in splits.values() for images in classes.values()):
        raise DataError(
            f"no images in {path}. Expected CLASS/*.jpg or train/CLASS/*.jpg (supported: "
            f"{', '.join(sorted(supported_suffixes()))})"
        )
    for part, classes in splits.items():
        empty = [name for name, images in classes.items() if not images]
        if empty:
            raise DataError(
                f"no images in class folder {', '.join(empty[:5])} ({part} of {path}). Add images, or remove the folder"
            )


def _check_classes(path: Path, splits: Mapping[str, ClassFiles]) -> None:
    for name in dict.fromkeys(name for classes in splits.values() for name in classes):
        if name.encode(errors="replace").decode() != name:  # no result file could hold it
            raise DataError(f"the name of class folder {name!a} in {path} is not UTF-8. Rename it")
    _check_not_empty(path, splits)
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
        raise DataError(f"only one class folder in {path}: {', '.join(train)}. At least two are needed")
