"""Where the images of a folder lie: class folders, with or without train, val and test above them."""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from petune.base.config import expand_home
from petune.base.errors import DataError, UsageError
from petune.data.images import OTHER_IMAGES, extensions

VAL_NAMES = ("val", "valid", "validation")
SPLIT_NAMES = {"train", "training", "test", "testing", *VAL_NAMES}

Files = Mapping[str, list[Path]]
"""Class name to its images, both in order."""


def folder_of(dataset: str) -> Path:
    """The PATH of `folder:PATH`, with `~` as the home directory."""
    return expand_home(dataset.removeprefix("folder:"))


def image_files(path: Path) -> tuple[dict[str, Files], dict[str, int]]:
    """The images of a folder dataset by split and class, as `load_folder` would read them.

    Returns:
        Also how many visible files are not read as images, by what their names end in.

    Raises:
        DataError: As `load_folder`, but for what decoding would show.
    """
    others = Counter[str]()
    found = {part: _files(where, others) for part, where in parts_of(path).items()}
    _check(path, found)
    return found, dict(sorted(others.items()))


def files_of_part(path: Path, part: str) -> tuple[str, Files, str]:
    """The images to evaluate on: of PATH/test or PATH/val, or all of a folder without either.

    As in `load_folder`, val is the test split of a folder that has no other.

    Returns:
        Which they are (`all` where the folder has no splits), the images, and what is said of files left out.

    Raises:
        DataError: No folder, no images, or a class folder without any.
        UsageError: It has splits, and another one is asked for.
    """
    if not path.is_dir():
        raise DataError(f"folder:PATH must name a folder of class folders, but {path} is {_what(path)}")
    names = {"train": ("train",), "val": VAL_NAMES, "test": ("test",)}
    splits = {n: path / name for n, several in names.items() for name in several if _has_folders(path / name)}
    if "val" in splits:
        splits.setdefault("test", splits["val"])
    if part not in splits and splits.keys() - {"train"}:
        raise UsageError(f"--split must be a folder of {path}, which has {' and '.join(splits)}, but is {part}")
    read = part if part in splits else "all"
    others = Counter[str]()
    files = _files(splits.get(part, splits.get("train", path)), others)
    _refuse_empty(path, {read: files})
    return read, files, unread(others)


def parts_of(path: Path) -> dict[str, Path]:
    """The folders that hold class folders, by split; all are `train` where nothing is above them.

    Raises:
        DataError: No folder, or splits that are called otherwise.
    """
    if not path.is_dir():
        raise DataError(f"folder:PATH must name a folder of class folders, but {path} is {_what(path)}")
    train = path / "train"
    if not _has_folders(train):  # a class may be called train: it then holds images only
        lonely = [name for name in ("test", *VAL_NAMES) if _has_folders(path / name)]
        if lonely:
            raise DataError(
                f"{path} must hold train/CLASS/* beside {lonely[0]}/, but has no class folders in train/; "
                "add them, or put the class folders directly into it"
            )
        splits = _called_otherwise(path)
        if splits:
            here = ", ".join(p.name for p in splits)
            raise DataError(
                f"the splits of {path} must be called train/, val/ and test/ and hold the class folders, but it has "
                f"{here}; rename them, or move them away"
            )
        return {"train": path}
    _refuse_other_splits(path)
    parts = {"train": train, "test": path / "test"}
    val = [path / name for name in VAL_NAMES if (path / name).is_dir()]
    if len(val) > 1:
        names = " and ".join(p.name for p in val)
        raise DataError(f"{path} must hold one validation folder, but has {names}; merge them")
    return {part: p for part, p in (parts | {"val": val[0] if val else path / "val"}).items() if p.is_dir()}


def _refuse_other_splits(path: Path) -> None:
    """Beside train/, a folder such as testing/ would be left out, and val/ be taken for the test split."""
    read = {"train", "test", *VAL_NAMES}
    others = [p.name for p in visible_folders(path) if p.name not in read and p.name.casefold() in SPLIT_NAMES]
    others = [name for name in others if _has_folders(path / name)]
    if others:
        raise DataError(
            f"the splits of {path} must be called train/, val/ and test/, but beside train/ it has "
            f"{', '.join(others)}; rename or move it away"
        )


def _called_otherwise(path: Path) -> list[Path]:
    """Folders of class folders that look like splits, as Train/ and Test/, or seg_train/ and seg_test/."""
    above = [p for p in visible_folders(path) if _has_folders(p)]
    alike = [p for p in above if SPLIT_NAMES.intersection(re.split("[^a-z]+", p.name.casefold()))]
    return alike if len(alike) > 1 or any(p.name.casefold() in SPLIT_NAMES for p in alike) else []


def _files(where: Path, others: Counter[str] | None = None) -> Files:
    return {folder.name: images_below(folder, others) for folder in visible_folders(where)}


def images_below(folder: Path, others: Counter[str] | None = None, *, unread: bool = False) -> list[Path]:
    """Every image in a folder and the folders in it, in order of their paths; hidden ones are left out.

    Args:
        folder: Where to look.
        others: Counts the other visible files, by what their names end in.
        unread: Whether images of kinds that are not read belong to it, to be named as such.
    """
    images, kinds = [], extensions() | OTHER_IMAGES if unread else extensions()
    for file in _files_below(folder):
        suffix = file.suffix.lower()
        if suffix in kinds:
            images.append(file)
        elif others is not None:
            others[suffix] += 1
    return sorted(images)


def _files_below(folder: Path) -> Iterator[Path]:
    """Every visible file; links are followed, but not to a folder that lies above them."""
    above = {_identity(place) for place in Path(os.path.abspath(folder)).parents}
    open_folders = [(folder, above)]
    while open_folders:
        here, above = open_folders.pop()
        identity = _identity(here)
        if identity is None or identity in above:
            continue
        with contextlib.suppress(OSError), os.scandir(here) as entries:  # suppressed: one that may not be read
            for entry in (entry for entry in entries if not entry.name.startswith(".")):
                if entry.is_dir():
                    open_folders.append((Path(entry.path), above | {identity}))
                else:
                    yield Path(entry.path)


def _identity(place: Path) -> tuple[int, int] | None:
    with contextlib.suppress(OSError):
        stat = place.stat()
        return stat.st_dev, stat.st_ino
    return None


def size_and_time(path: Path) -> tuple[int, int]:
    """Of a file, in bytes and ns; zero for a link to nowhere, which is found to be broken when it is decoded."""
    with contextlib.suppress(OSError):
        stat = path.stat()
        return stat.st_size, stat.st_mtime_ns
    return 0, 0


def unread(by_suffix: Mapping[str, int]) -> str:
    """What is said of images among what was left out; empty without any."""
    kinds = [f"{count:,} {suffix}" for suffix, count in by_suffix.items() if suffix in OTHER_IMAGES]
    return f"{', '.join(kinds)} left out (of a kind that is not read here; convert them)" if kinds else ""


def visible_folders(path: Path) -> list[Path]:
    """The folders in a folder, in order, but for hidden ones."""
    return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _has_folders(path: Path) -> bool:
    return path.is_dir() and bool(visible_folders(path))


def _refuse_empty(path: Path, found: Mapping[str, Files]) -> None:
    if not any(files for part in found.values() for files in part.values()):
        raise DataError(
            f"{path} must hold images as CLASS/*.jpg or train/CLASS/*.jpg, but has none; check the path "
            f"(read are {', '.join(sorted(extensions()))})"
        )
    for part, files in found.items():
        empty = [name for name, images in files.items() if not images]
        if empty:
            raise DataError(
                f"every class folder of {path} must hold an image, but {part} has none for "
                f"{', '.join(empty[:5])}; fill or remove it"
            )


def _check(path: Path, found: Mapping[str, Files]) -> None:
    for name in dict.fromkeys(name for files in found.values() for name in files):
        if name.encode(errors="replace").decode() != name:  # a byte that is no UTF-8, which no result could hold
            raise DataError(f"class folders must have UTF-8 names, but {path} has {name!a}; rename it")
    _refuse_empty(path, found)
    for part, files in found.items():
        missing, extra = sorted(set(found["train"]) - set(files)), sorted(set(files) - set(found["train"]))
        if missing or extra:
            said = [f"{part} lacks {', '.join(missing[:5])}"] if missing else []
            said += [f"train lacks {', '.join(extra[:5])}"] if extra else []
            raise DataError(f"the splits of {path} must have the same classes, but {' and '.join(said)}")
    if len(found["train"]) < 2:
        raise DataError(f"{path} must hold two class folders or more, but has only {', '.join(found['train'])}")


def _what(path: Path) -> str:
    return "a file" if path.exists() else "not there"
