"""Targets, manifest and test files of class folders, of images or of videos."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from petune.base.errors import DataError
from petune.base.text import plural
from petune.data.dataset import Target
from petune.data.find_images import FileKind, visible_subfolders
from petune.data.layout import list_images, list_split
from petune.data.manifest import Manifest, file_entry
from petune.data.reader import LabeledFiles
from petune.data.splits import split_folders


def target_of_folders(path: Path) -> Target:
    """Return the names of the class folders.

    Raises:
        DataError: The folder does not exist or has fewer than two classes.
    """
    names = tuple(folder.name for folder in visible_subfolders(split_folders(path)["train"]))
    if len(names) < 2:
        raise DataError(f"{path} has {plural(len(names), 'class folder')}. A dataset needs at least two")
    return Target("class", names)


def manifest_of_folders(path: Path, kind: FileKind) -> Manifest:
    """Return names and sizes of the files by split and class; empty if the folder does not exist here.

    Raises:
        DataError: The layout is wrong: see `petune.data.folder`.
    """
    if not path.is_dir():
        return {}
    folders = split_folders(path)
    splits, _ = list_images(path, kind)
    return {
        part: {name: file_entry(files, folders[part] / name) for name, files in classes.items()}
        for part, classes in splits.items()
    }


def labeled_files_of(path: Path, part: str, kind: FileKind) -> LabeledFiles:
    """Return PATH/test or PATH/val, or the whole folder if it has no splits; see `list_split`."""
    split, classes, note = list_split(path, part, kind)
    files = [file for images in classes.values() for file in images]
    labels = np.repeat(np.arange(len(classes)), [len(images) for images in classes.values()])
    return LabeledFiles(split, files, Target("class", tuple(classes)), labels, note)
