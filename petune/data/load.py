"""Load a dataset by name."""

from __future__ import annotations

import os
from pathlib import Path

from petune.base.errors import UnknownName
from petune.data.dataset import Dataset, OnBroken

DATASETS = {
    "cifar10": "60,000 images of 10 classes, 32x32",
    "cifar100": "60,000 images of 100 classes, 32x32",
    "digits": "scikit-learn's 1,797 handwritten digits, 8x8, no download",
    "folder:PATH": "your images: PATH/CLASS/*.jpg, or PATH/train/CLASS/*.jpg with test/ and val/",
}
"""Name to a line of description."""
FOLDER_HINT = "For a folder of images use folder:PATH; save any other dataset as such a folder"


def list_datasets() -> list[str]:
    """Return the names that `load_dataset` accepts; `folder:PATH` stands for any folder of images."""
    return list(DATASETS)


def load_dataset(
    name: str, data_dir: Path | None = None, image_size: int = 224, on_broken: OnBroken = "error"
) -> Dataset:
    """Load a dataset.

    Args:
        name: A key of `DATASETS`.
        data_dir: Directory that holds CIFAR. Defaults to `PETUNE_DATA`, then to the cache directory.
        image_size: Side, in pixels, at which images of a folder will be used.
        on_broken: For a folder: see `petune.data.folder`.

    Raises:
        UnknownName: There is no such dataset.
        DataError: The dataset is missing, broken or inconsistent.
    """
    if name.startswith("folder:"):
        from petune.data.folder import load_folder
        from petune.data.layout import folder_path

        return load_folder(folder_path(name), image_size, on_broken)
    if name in {"cifar10", "cifar100"}:
        from petune.data.cifar import load_cifar

        return load_cifar(name, data_dir or default_data_dir())
    if name == "digits":
        from petune.data.digits import load_digits

        return load_digits()
    raise UnknownName("dataset", name, DATASETS, FOLDER_HINT)


def default_data_dir() -> Path | None:
    """Return the directory named by `PETUNE_DATA`, or None."""
    value = os.environ.get("PETUNE_DATA")
    return Path(value) if value else None
