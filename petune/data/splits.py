"""Split folders of a folder dataset: find them by their common names; never take a split for a class."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from petune.base.errors import DataError
from petune.data.doubtful_classes import check_doubtful_classes
from petune.data.find_images import IMAGES, FileKind, has_subfolders, visible_subfolders
from petune.data.split_names import SplitName, parse_split_name, split_of

MAX_SHOWN = 5


def named_splits(path: Path) -> dict[str, Path]:
    """Return the folder of each split that has one; empty if the folder holds class folders only.

    Raises:
        DataError: A split has images but no class folders, or two folders; or names are ambiguous.
    """
    folders = _split_candidates(path)
    if not any(map(has_subfolders, folders)):
        _check_no_splits(path)
        return {}
    loose = [folder for folder in folders if not has_subfolders(folder)]
    if loose:
        raise DataError(_loose_message(path, loose))
    splits: dict[str, list[Path]] = {}
    for folder, name in _parsed(folders).items():
        splits.setdefault(name.split, []).append(folder)
    for split, named in splits.items():
        if len(named) > 1:
            raise DataError(f"{path} has more than one {split} folder: {_names(named)}. Merge them, or move one away")
    return {split: splits[split][0] for split in ("train", "test", "val") if split in splits}


def _split_candidates(path: Path) -> list[Path]:
    """Return the folders that together look like splits: `train` and `test_images`, or `seg_train` and `seg_test`.

    Raises:
        DataError: There are several such groups, or the splits are only parts of words, as in `segtrain`.
    """
    siblings = visible_subfolders(path)
    groups = _groups(siblings)
    plain = groups.pop("", [])
    exact = {split_of(folder.name): folder for folder in plain if split_of(folder.name)}
    if any(map(has_subfolders, exact.values())) or _are_splits(plain, siblings):
        return [f for f in plain if f in exact.values() or has_subfolders(f) or _parsed([f])[f].split not in exact]
    likely = [folder for group in groups.values() if _are_splits(group, siblings) for folder in group]
    if not likely:
        return []
    names = _parsed(likely).values()
    if len({name.rest for name in names}) > 1 or not all(name.is_word for name in names):
        raise DataError(_ambiguous_message(path, likely))
    return likely


def _groups(siblings: list[Path]) -> dict[str, list[Path]]:
    """Group folders with a split in their name by the rest of the name."""
    groups: dict[str, list[Path]] = {}
    for folder, name in _parsed(siblings).items():
        groups.setdefault(name.rest, []).append(folder)
    return groups


def _parsed(folders: Iterable[Path]) -> dict[Path, SplitName]:
    names = {folder: parse_split_name(folder.name) for folder in folders}
    return {folder: name for folder, name in names.items() if name is not None}


def _are_splits(group: list[Path], siblings: list[Path]) -> bool:
    """Return True if folders are splits and not classes, some of which have such names (`bus` and `train`)."""
    names = _parsed(group).values()
    splits = {name.split for name in names}
    if "train" in splits and len(splits) > 1:
        return True
    is_all = bool(group) and len(group) == len(siblings) and all(name.is_word for name in names)
    return is_all and (len(splits) > 1 or all(name.is_numbered for name in names))


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
    others = [folder for folder in visible_subfolders(path) if folder not in splits.values()]
    similar = [folder for folder in _words(others) if has_subfolders(folder)]
    if len(similar) > (0 if splits else 1):
        raise DataError(_ambiguous_message(path, similar))
    return splits or {"train": path}


def check_is_folder(path: Path) -> None:
    """Raise a DataError if `path` is not a folder."""
    if not path.exists():
        raise DataError(f"no such folder: {path}")
    if not path.is_dir():
        raise DataError(f"{path} is a file. Give a folder of class folders")


def left_out_note(path: Path, kind: FileKind = IMAGES) -> str:
    """Name what a folder dataset has outside its class folders, which is not read; empty if there is nothing."""
    splits = named_splits(path)
    used = set(splits.values())
    entries = [f"{folder.name}/" for folder in visible_subfolders(path) if splits and folder not in used]
    for folder in (path, *splits.values()):
        count = sum(_is_of_kind(file, kind) for file in folder.iterdir())
        if count:
            where = "outside class folders" if folder == path else f"directly in {folder.name}/"
            entries.append(f"{count} {kind.noun}{'s' if count > 1 else ''} {where}")
    more = f" and {len(entries) - MAX_SHOWN} more" if len(entries) > MAX_SHOWN else ""
    return f"left out: {', '.join(entries[:MAX_SHOWN])}{more}" if entries else ""


def _is_of_kind(file: Path, kind: FileKind) -> bool:
    return file.suffix.lower() in kind.suffixes() and not file.name.startswith(".") and not file.is_dir()


def _check_no_splits(path: Path) -> None:
    """Refuse images directly in train/ and test/, which would become classes, and splits inside class folders."""
    siblings = visible_subfolders(path)
    named = _similar_to_splits(siblings)
    if any(map(has_subfolders, named)):
        raise DataError(_ambiguous_message(path, named))
    if named:
        raise DataError(
            f"{_loose_message(path, named)}. If {_names(named)} are classes, put all class folders into train/"
        )
    for folder in siblings:
        inner = _similar_to_splits(visible_subfolders(folder))
        if any(map(has_subfolders, inner)):
            raise DataError(
                f"{folder} has splits in it: {_names(inner)}. Use folder:{folder}, or move the splits up into {path}"
            )
        if len(inner) > 1:
            raise DataError(
                f"{folder} has splits in it: {_names(inner)}. Move them above the class folders, as "
                f"train/{folder.name}/ and test/{folder.name}/, for every class"
            )
    check_doubtful_classes(path, siblings)


def _similar_to_splits(siblings: list[Path]) -> list[Path]:
    """Return folders that are splits by their names, even if their names differ in more than the split."""
    names = _parsed(siblings)
    numbered = [folder for folder, name in names.items() if name.is_numbered]
    every = _words(siblings) if len(_words(siblings)) == len(siblings) else []
    groups = [*_groups(siblings).values(), numbered, every]
    return next((group for group in groups if _are_splits(group, siblings)), [])


def _words(folders: Iterable[Path]) -> list[Path]:
    return [folder for folder, name in _parsed(folders).items() if name.is_word]


def _loose_message(path: Path, folders: list[Path]) -> str:
    slashed = " and ".join(f"{folder.name}/" for folder in folders)
    sorted_into = " and ".join(f"{folder.name}/CLASS/" for folder in folders)
    return f"{path} has no class folders in {slashed}. Sort the images into {sorted_into}, or move them away"


def _ambiguous_message(path: Path, folders: list[Path]) -> str:
    return (
        f"unknown split folders in {path}: {_names(folders)}. Rename them to train/, val/ and test/, or move them "
        "away; if they are classes, put all class folders into train/"
    )


def _names(folders: list[Path]) -> str:
    return " and ".join(folder.name for folder in folders)
