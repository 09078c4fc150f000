"""The dataset `folder:PATH`: class folders, with or without train, val and test above them."""

from __future__ import annotations

from pathlib import Path

from petune.base.config import expand_home
from petune.data.class_folders import labeled_files_of, manifest_of_folders, target_of_folders
from petune.data.dataset import Dataset, Target
from petune.data.find_images import IMAGES
from petune.data.folder import load_folder
from petune.data.manifest import Manifest
from petune.data.reader import DatasetReader, LabeledFiles, ReadContext, ReaderConfig


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
        return load_folder(self.path, context.image_size, context.on_broken, context.cache_gb, context.max_broken)

    def target(self, context: ReadContext) -> Target:
        """Return the names of the class folders.

        Raises:
            DataError: The folder does not exist or has fewer than two classes.
        """
        return target_of_folders(self.path)

    def find(self, data_dir: Path | None) -> str | None:
        """Return the folder, if it exists."""
        return str(self.path) if self.path.is_dir() else None

    def manifest(self, data_dir: Path | None) -> Manifest:
        """Return names and sizes of the images by split and class; empty if the folder does not exist here.

        Raises:
            DataError: The layout is wrong: see `petune.data.folder`.
        """
        return manifest_of_folders(self.path, IMAGES)

    def labeled_files(self, part: str) -> LabeledFiles:
        """Return PATH/test or PATH/val, or the whole folder if it has no splits."""
        return labeled_files_of(self.path, part, IMAGES)
