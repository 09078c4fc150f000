"""Datasets by name or folder, decoded once, augmented by the batch."""

from __future__ import annotations

import os
from pathlib import Path

from petune.base.errors import UnknownName
from petune.data.batches import Preprocess
from petune.data.dataset import Dataset, OnBroken, Split

NAMES = {
    "cifar10": "60,000 images of 10 classes, 32x32",
    "cifar100": "60,000 images of 100 classes, 32x32",
    "digits": "scikit-learn's 1,797 handwritten digits, 8x8, no download",
    "folder:PATH": "your images: PATH/CLASS/*.jpg, or PATH/train/CLASS/*.jpg with test/ and val/",
}


def load_dataset(
    name: str, data_dir: Path | None = None, image_size: int = 224, on_broken: OnBroken = "error"
) -> Dataset:
    """Load a dataset.

    Args:
        name: A key of `NAMES`.
        data_dir: Where CIFAR lies; without it `PETUNE_DATA`, then the cache directory.
        image_size: Side in pixels that images of a folder will be used at.
        on_broken: For a folder: see `petune.data.folder`.

    Raises:
        UnknownName: No such dataset.
        DataError: It is missing, broken or contradicts itself.
    """
    place = data_dir or (Path(os.environ["PETUNE_DATA"]) if os.environ.get("PETUNE_DATA") else None)
    if name.startswith("folder:"):
        from petune.data.folder import load_folder
        from petune.data.layout import folder_of

        return load_folder(folder_of(name), image_size, on_broken)
    if name in {"cifar10", "cifar100"}:
        from petune.data.cifar import load_cifar

        return load_cifar(name, place)
    if name == "digits":
        from petune.data.digits import load_digits

        return load_digits()
    raise UnknownName("dataset", name, NAMES, "images in folders are folder:PATH")


__all__ = ["NAMES", "Dataset", "OnBroken", "Preprocess", "Split", "load_dataset"]
