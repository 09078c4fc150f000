"""The dataset `folder:PATH`: class folders, with or without train, val and test above them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from petune.base.config import expand_home
from petune.base.errors import DataError
from petune.base.text import plural
from petune.data.dataset import Dataset, Target
from petune.data.find_images import visible_subfolders
from petune.data.folder import load_folder
from petune.data.layout import list_images, list_split
from petune.data.manifest import Manifest, file_entry
from petune.data.reader import DatasetReader, LabeledFiles, ReadContext, ReaderConfig
from petune.data.splits import split_folders


class FolderReader(DatasetReader[ReaderConfig]):
    """A folder of class folders."""

    about = "your images: PATH/CLASS/*.jpg, or PATH/train/CLASS/*.jpg with test/ and val/"
    argument = "PATH"

    @property
    def path(self) -> Path:
        """The folder, with `~` expanded."""
        return expand_home(self.argument_value)

    def load(self, context: ReadContext) -> Dataset:
        """Decode the images once into the cache; see `petune.data.folder`."""
        return load_folder(self.path, context.image_size, context.on_broken, context.cache_gb)

    def target(self, context: ReadContext) -> Target:
        """Return the names of the class folders.

        Raises:
            DataError: The folder does not exist or has fewer than two classes.
        """
        names = tuple(folder.name for folder in visible_subfolders(split_folders(self.path)["train"]))
        if len(names) < 2:
            raise DataError(f"{self.path} has {plural(len(names), 'class folder')}. A dataset needs at least two")
        return Target("class", names)

    def find(self, data_dir: Path | None) -> str | None:
        """Return the folder, if it exists."""
        return str(self.path) if self.path.is_dir() else None

    def manifest(self, data_dir: Path | None) -> Manifest:
        """Return names and sizes of the images by split and class; empty if the folder does not exist here.

        Raises:
            DataError: The layout is wrong: see `petune.data.folder`.
        """
        if not self.path.is_dir():
            return {}
        folders = split_folders(self.path)
        splits, _ = list_images(self.path)
        return {
            part: {name: file_entry(images, folders[part] / name) for name, images in classes.items()}
            for part, classes in splits.items()
        }

    def labeled_files(self, part: str) -> LabeledFiles:
        """Return PATH/test or PATH/val, or the whole folder if it has no splits."""
        split, classes, note = list_split(self.path, part)
        files = [file for images in classes.values() for file in images]
        labels = np.repeat(np.arange(len(classes)), [len(images) for images in classes.values()])
        return LabeledFiles(split, files, Target("class", tuple(classes)), labels, note)
