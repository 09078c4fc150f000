"""Your own pictures: a folder of class folders, with or without train, val and test above them."""

from __future__ import annotations

import contextlib
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from petune.data.cache import Allocate, decoded
from petune.data.dataset import Dataset, OnBroken, Split, stratified
from petune.data.pictures import OTHER_PICTURES, decode_pictures, extensions
from petune.errors import DataError, UsageError

FORMAT = 1
CROP = 0.875  # timm's usual share of the side that evaluation sees; the rest is kept as a margin
TEST_FRACTION = 0.2
MOST_BROKEN, SKIPPED = 0.01, -1
VAL_NAMES = ("val", "valid", "validation")
SPLIT_NAMES = {"train", "training", "test", "testing", *VAL_NAMES}

Files = Mapping[str, list[Path]]
"""Class name to its pictures, both in order."""


def load_folder(path: Path, image_size: int, on_broken: OnBroken = "error") -> Dataset:
    """Load PATH/train/CLASS/*, PATH/val/CLASS/*, PATH/test/CLASS/*, or PATH/CLASS/*.

    Without a test folder the val folder is the test split, as in ImageNet, and without either a stratified
    fifth is cut from train, always the same one. Without both, `Dataset.with_val` cuts val from train.

    Args:
        path: The folder.
        image_size: Side in pixels that the pictures will be used at; they are stored with a margin around it.
        on_broken: What a picture that cannot be decoded is: an `error`, or `skip` takes it away before anything is
            drawn, says so in `source`, and is an error above 1 % of a split.

    Raises:
        DataError: No pictures, fewer than two classes, an empty class, classes that differ between
            splits, or a picture that cannot be decoded (with its path).
    """
    found, others = picture_files(path)
    side = math.ceil(image_size / CROP)
    skipped: list[Path] = []
    splits = {part: _decode(path, files, side, on_broken == "skip", skipped) for part, files in found.items()}
    train, none = splits["train"], splits["train"].take(np.arange(0))
    dataset = Dataset(f"folder:{path}", tuple(found["train"]), str(path), "crop", train, none, none)
    if "test" in splits:
        dataset = replace(dataset, val=splits.get("val", none), test=splits["test"])
    elif "val" in splits:
        dataset = replace(dataset, test=splits["val"], source=f"{path} (its val folder is the test split)")
    else:
        cut = stratified(train.labels, TEST_FRACTION, seed=0)
        dataset = replace(
            dataset,
            train=train.take(np.flatnonzero(~cut)),
            test=train.take(np.flatnonzero(cut)),
            source=f"{path} (no test folder: {TEST_FRACTION:.0%} of each class are the test split)",
        )
    if skipped:
        shown = ", ".join(str(p.relative_to(path)) for p in skipped[:5]) + (", …" if len(skipped) > 5 else "")
        dataset = replace(dataset, source=f"{dataset.source}; {len(skipped)} broken skipped: {shown}")
    if said := unread(others):
        dataset = replace(dataset, source=f"{dataset.source}; {said}")
    return dataset.checked()


def picture_files(path: Path) -> tuple[dict[str, Files], dict[str, int]]:
    """The pictures of a folder dataset by split and class, as `load_folder` would read them.

    Returns:
        Also how many visible files are not read as pictures, by what their names end in.

    Raises:
        DataError: As `load_folder`, but for what decoding would show.
    """
    others = Counter[str]()
    found = {part: _files(where, others) for part, where in _parts(path).items()}
    _check(path, found)
    return found, dict(sorted(others.items()))


def files_of_part(path: Path, part: str) -> tuple[str, Files]:
    """The pictures to evaluate on, and which they are: of PATH/test or PATH/val, or `all` of a folder without either.

    Raises:
        DataError: No folder, no pictures, or a class folder without any.
        UsageError: It has splits, and another one is asked for.
    """
    if not path.is_dir():
        raise DataError(f"folder:PATH must name a folder of class folders, but {path} is {_what(path)}")
    names = {"train": ("train",), "val": VAL_NAMES, "test": ("test",)}
    splits = {n: path / name for n, several in names.items() for name in several if _has_folders(path / name)}
    if part not in splits and splits.keys() - {"train"}:
        raise UsageError(f"--split must be a folder of {path}, which has {' and '.join(splits)}, but is {part}")
    read = part if part in splits else "all"
    files = _files(splits.get(part, splits.get("train", path)))
    _refuse_empty(path, {read: files})
    return read, files


def _parts(path: Path) -> dict[str, Path]:
    if not path.is_dir():
        raise DataError(f"folder:PATH must name a folder of class folders, but {path} is {_what(path)}")
    train = path / "train"
    if not _has_folders(train):  # a class may be called train: it then holds pictures only
        lonely = [name for name in ("test", *VAL_NAMES) if _has_folders(path / name)]
        if lonely:
            raise DataError(
                f"{path} must hold train/CLASS/* beside {lonely[0]}/, but has no class folders in train/; "
                "add them, or put the class folders directly into it"
            )
        folders = _visible_folders(path)
        if {p.name.casefold() for p in folders} <= SPLIT_NAMES and any(_has_folders(p) for p in folders):
            here = ", ".join(p.name for p in folders)
            raise DataError(f"the splits of {path} must be called train/, val/ and test/, but are {here}; rename them")
        return {"train": path}
    parts = {"train": train, "test": path / "test"}
    val = [path / name for name in VAL_NAMES if (path / name).is_dir()]
    if len(val) > 1:
        names = " and ".join(p.name for p in val)
        raise DataError(f"{path} must hold one validation folder, but has {names}; merge them")
    return {part: p for part, p in (parts | {"val": val[0] if val else path / "val"}).items() if p.is_dir()}


def _files(where: Path, others: Counter[str] | None = None) -> Files:
    return {folder.name: pictures_below(folder, others) for folder in _visible_folders(where)}


def pictures_below(folder: Path, others: Counter[str] | None = None) -> list[Path]:
    """Every picture in a folder and the folders in it, in order of their paths; hidden ones are left out.

    Args:
        folder: Where to look.
        others: Counts the other visible files, by what their names end in.
    """
    pictures = []
    for file in _files_below(folder):
        suffix = file.suffix.lower()
        if suffix in extensions():
            pictures.append(file)
        elif others is not None:
            others[suffix] += 1
    return sorted(pictures)


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


def unread(by_suffix: Mapping[str, int]) -> str:
    """What is said of pictures among what was left out; empty without any."""
    kinds = [f"{count:,} {suffix}" for suffix, count in by_suffix.items() if suffix in OTHER_PICTURES]
    return f"{', '.join(kinds)} left out (of a kind that is not read here; convert them)" if kinds else ""


def _visible_folders(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _has_folders(path: Path) -> bool:
    return path.is_dir() and bool(_visible_folders(path))


def _refuse_empty(path: Path, found: Mapping[str, Files]) -> None:
    if not any(files for part in found.values() for files in part.values()):
        raise DataError(
            f"{path} must hold pictures as CLASS/*.jpg or train/CLASS/*.jpg, but has none; check the path "
            f"(read are {', '.join(sorted(extensions()))})"
        )
    for part, files in found.items():
        empty = [name for name, pictures in files.items() if not pictures]
        if empty:
            raise DataError(
                f"every class folder of {path} must hold a picture, but {part} has none for "
                f"{', '.join(empty[:5])}; fill or remove it"
            )


def _check(path: Path, found: Mapping[str, Files]) -> None:
    _refuse_empty(path, found)
    for part, files in found.items():
        missing, extra = sorted(set(found["train"]) - set(files)), sorted(set(files) - set(found["train"]))
        if missing or extra:
            said = [f"{part} lacks {', '.join(missing[:5])}"] if missing else []
            said += [f"train lacks {', '.join(extra[:5])}"] if extra else []
            raise DataError(f"the splits of {path} must have the same classes, but {' and '.join(said)}")
    if len(found["train"]) < 2:
        raise DataError(f"{path} must hold two class folders or more, but has only {', '.join(found['train'])}")


def _decode(root: Path, files: Files, side: int, skip: bool, skipped: list[Path]) -> Split:
    paths = [picture for pictures in files.values() for picture in pictures]
    labels = np.repeat(np.arange(len(files)), [len(pictures) for pictures in files.values()])
    entries = [[str(p.relative_to(root)), *_size_and_time(p)] for p in paths]
    key = {"format": FORMAT, "root": str(root.resolve()), "side": side, "files": entries} | (
        {"skip": 1} if skip else {}
    )

    def decode(allocate: Allocate) -> NDArray[np.int64]:
        broken = decode_pictures(paths, allocate(len(paths), side), skip=skip)
        if len(broken) > MOST_BROKEN * len(paths):
            raise DataError(
                f"at most {MOST_BROKEN:.0%} of the pictures may be broken and skipped, but {len(broken)} of "
                f"{len(paths)} are, first: {next(iter(broken.values()))}. `petune data check {root}` lists them all"
            )
        marked = labels.copy()
        marked[list(broken)] = SKIPPED
        return marked

    split = decoded(key, decode, CROP)
    gone = split.labels == SKIPPED
    skipped += [paths[i] for i in np.flatnonzero(gone)]
    return split.take(np.flatnonzero(~gone)) if gone.any() else split


def _size_and_time(path: Path) -> tuple[int, int]:
    """Of a file, in bytes and ns; zero for a link to nowhere, which is found to be broken when it is decoded."""
    with contextlib.suppress(OSError):
        stat = path.stat()
        return stat.st_size, stat.st_mtime_ns
    return 0, 0


def _what(path: Path) -> str:
    return "a file" if path.exists() else "not there"
