"""The datasets `vtab:NAME`: the layout of VTAB-1k (Zhai et al., 2019, arXiv:1910.04867) that papers on tuning share.

A folder with lists of images, one `PATH LABEL` a line: `train800.txt`, `val200.txt`, `test.txt`, and
`train800val200.txt` with the images of the first two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from petune.base.config import expand_home
from petune.base.errors import DataError
from petune.base.text import plural
from petune.data.cache import Allocate, cached_split
from petune.data.copies import copies_note
from petune.data.dataset import Dataset, Split, Target
from petune.data.find_images import size_and_time
from petune.data.images import decode_images
from petune.data.manifest import Manifest, file_entry, name_below
from petune.data.reader import DatasetReader, LabeledFiles, ReadContext, ReaderConfig

FORMAT = 1
MAX_CLASSES = 100_000
LISTS = {"train": "train800.txt", "val": "val200.txt", "test": "test.txt"}
BOTH = "train800val200.txt"
CITATION = "Zhai et al., A Large-scale Study of Representation Learning with VTAB (2019), arXiv:1910.04867"


@dataclass(frozen=True)
class _Listed:
    """Images and labels of one list."""

    files: list[Path]
    labels: NDArray[np.int64]


class VtabReader(DatasetReader[ReaderConfig]):
    """A dataset in VTAB-1k's layout."""

    about = "1,000 training images in VTAB-1k's layout: train800.txt, val200.txt, test.txt"
    needs = "DATA_DIR/NAME, DATA_DIR/vtab-1k/NAME or a path"
    argument = "NAME"

    @property
    def path(self) -> Path | None:
        """The folder, if the argument is a path of one."""
        path = expand_home(self.argument_value)
        return path if (path / LISTS["train"]).is_file() else None

    def find(self, data_dir: Path | None) -> str | None:
        """Return the folder with the lists."""
        folder = self._find(data_dir)
        return str(folder) if folder else None

    def target(self, context: ReadContext) -> Target:
        """Return the classes, which have numbers only."""
        return _target(self._lists(context.data_dir))

    def load(self, context: ReadContext) -> Dataset:
        """Decode the images once into the cache, their center squares without a margin."""
        folder, lists = self._folder(context.data_dir), self._lists(context.data_dir)
        count = len(lists["train"].files)
        parts = [lists["train"], lists["val"]]
        both = _Listed([file for part in parts for file in part.files], np.concatenate([p.labels for p in parts]))
        read = partial(_read, folder=folder, side=context.image_size)
        thousand, test = read(both), read(lists["test"])
        name = f"{self.name or 'vtab'}:{self.argument_value}"
        dataset = Dataset(
            name,
            _target(lists),
            str(folder),
            "none",
            train=thousand.take(np.arange(count)),
            val=thousand.take(np.arange(count, len(thousand))),
            test=test,
            citation=CITATION,
            refit=True,
            may_lack_classes=True,
        )
        files = {part: listed.files for part, listed in lists.items()}
        return dataset.with_note(_unused_note(lists)).with_note(copies_note(files, folder))

    def manifest(self, data_dir: Path | None) -> Manifest:
        """Return names and sizes of the images by split and class; empty if the folder does not exist here."""
        folder = self._find(data_dir)
        if folder is None:
            return {}
        lists, names = self._lists(data_dir), _target(self._lists(data_dir)).names
        return {
            part: {
                name: file_entry([listed.files[i] for i in np.flatnonzero(listed.labels == label)], folder)
                for label, name in enumerate(names)
            }
            for part, listed in lists.items()
        }

    def labeled_files(self, part: str) -> LabeledFiles:
        """Return the images of test.txt or val200.txt."""
        lists = self._lists(None)
        listed = lists["val" if part == "val" else "test"]
        return LabeledFiles(part, listed.files, _target(lists), listed.labels)

    def _find(self, data_dir: Path | None) -> Path | None:
        named = [] if data_dir is None else [data_dir / self.argument_value, data_dir / "vtab-1k" / self.argument_value]
        folders = [folder for folder in (self.path, *named) if folder is not None]
        return next((folder for folder in folders if (folder / LISTS["train"]).is_file()), None)

    def _folder(self, data_dir: Path | None) -> Path:
        folder = self._find(data_dir)
        if folder is None:
            where = f"{self.argument_value}, {data_dir}/{self.argument_value} and {data_dir}/vtab-1k"
            raise DataError(
                f"no {LISTS['train']} in {where if data_dir else self.argument_value}. Set data_dir or PETUNE_DATA to "
                "the directory of the folder, or give its path: vtab:PATH",
                cli_hint="Name the directory with --data-dir",
            )
        return folder

    def _lists(self, data_dir: Path | None) -> dict[str, _Listed]:
        folder = self._folder(data_dir)
        lists = {part: _read_list(folder, file) for part, file in LISTS.items()}
        _check_apart(folder, lists)
        return lists


def _target(lists: dict[str, _Listed]) -> Target:
    count = max(int(listed.labels.max()) for listed in lists.values()) + 1
    return Target("class", tuple(map(str, range(count))))


def _unused_note(lists: dict[str, _Listed]) -> str:
    """Tell classes without an image in any list, such as 0 where someone counted from 1."""
    used = np.unique(np.concatenate([listed.labels for listed in lists.values()]))
    unused = sorted({*range(int(used.max()))} - {*used.tolist()})
    shown = ", ".join(map(str, unused[:5])) + (f" and {len(unused) - 5:,} more" if len(unused) > 5 else "")
    return f"no image of {'class' if len(unused) == 1 else 'classes'} {shown} in any list" if unused else ""


def _read_list(folder: Path, name: str) -> _Listed:
    """Read one list; paths are absolute, or those of images in the folder or in its folder `images`."""
    file = folder / name
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except FileNotFoundError:
        raise DataError(f"no {name} in {folder}. VTAB's layout has {', '.join([*LISTS.values(), BOTH])}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {file}: {error}") from None
    if not lines:
        raise DataError(f"{file} is empty")
    images, labels = [], []
    for number, line in enumerate(lines, 1):
        image, _, label = line.strip().rpartition(" ")
        if not image or not label.isdecimal():
            raise DataError(f"{file}, line {number}: {line!r} is not a path and the number of a class")
        if len(label) > len(str(MAX_CLASSES)) or int(label) >= MAX_CLASSES:
            raise DataError(f"{file}, line {number}: class {label} is too large a number. Classes are counted from 0")
        images.append(image.strip())
        labels.append(int(label))
    return _Listed(_existing(folder, images, file), np.array(labels, np.int64))


def _existing(folder: Path, images: Sequence[str], file: Path) -> list[Path]:
    paths = [folder / image if (folder / image).is_file() else folder / "images" / image for image in images]
    missing = [images[i] for i, path in enumerate(paths) if not path.is_file()]
    if missing:
        raise DataError(
            f"{plural(len(missing), 'image')} of {file} not found, the first: {folder / missing[0]}. Put them there"
        )
    return paths


def _check_apart(folder: Path, lists: dict[str, _Listed]) -> None:
    """Check that no file is in two lists, and that train800val200.txt, if there is one, joins the first two."""
    listed: dict[Path, str] = {}
    for part, content in lists.items():
        for path in (file.resolve() for file in content.files):
            if path in listed:
                raise DataError(f"{path} is in {LISTS[part]} and in {LISTS[listed[path]]}. Remove one of the lines")
            listed[path] = part
    if not (folder / BOTH).is_file():
        return
    both = _read_list(folder, BOTH)
    joined = dict(zip(both.files, both.labels.tolist(), strict=True))
    parts = (lists["train"], lists["val"])
    expected = {path: label for part in parts for path, label in zip(part.files, part.labels.tolist(), strict=True)}
    if joined != expected:
        different = sorted(path for path, _ in joined.items() ^ expected.items())[0]
        raise DataError(
            f"{folder / BOTH} is not {LISTS['train']} and {LISTS['val']} together: {different} differs. Correct a list"
        )


def _read(listed: _Listed, folder: Path, side: int) -> Split:
    entries = [[name_below(path, folder), *size_and_time(path)] for path in listed.files]
    labels = listed.labels.tolist()
    key = {"vtab": FORMAT, "root": str(folder.resolve()), "side": side, "files": entries, "labels": labels}

    def decode(allocate: Allocate) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        broken = decode_images(listed.files, allocate(len(listed.files), side))
        if broken:  # none may be left out, or the numbers could not be compared with those of papers
            raise DataError(f"{next(iter(broken.values()))}. Get this image again: VTAB's lists are used as a whole")
        return listed.labels, np.arange(len(labels))

    return replace(cached_split(key, decode), names=np.array([str(path) for path in listed.files]))
