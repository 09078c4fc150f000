"""What is known of a dataset without decoding an image: where it lies, how many classes it has."""

from __future__ import annotations

import os
from pathlib import Path

from petune.base.errors import DataError, UnknownName
from petune.data.cache import cache_dir
from petune.data.cifar import parquet_files, published
from petune.data.layout import folder_of, parts_of, visible_folders

NUM_CLASSES = {"cifar10": 10, "cifar100": 100, "digits": 10}


def find_dataset(name: str, data_dir: Path | None = None) -> str | None:
    """Where `load_dataset` would read it from; None if it would have to download it.

    Args:
        name: `cifar10`, `cifar100` or `digits`.
        data_dir: As for `load_dataset`.
    """
    if name == "digits":
        return "scikit-learn"
    if name not in NUM_CLASSES:
        return None
    own = data_dir or (Path(os.environ["PETUNE_DATA"]) if os.environ.get("PETUNE_DATA") else None)
    for place in (own, cache_dir() / "data"):
        if place is not None:
            found, files = published(name, place), parquet_files(name, place)
            if found or files is not None:
                return str(found[0] if found else (files or {})["train"][0].parent)
    return None


def count_classes(name: str) -> int:
    """How many classes a dataset has.

    Raises:
        UnknownName: No such dataset.
        DataError: A folder that is not there or holds fewer than two classes.
    """
    if name in NUM_CLASSES:
        return NUM_CLASSES[name]
    if not name.startswith("folder:"):
        from petune.data import NAMES

        raise UnknownName("dataset", name, NAMES, "images in folders are folder:PATH")
    path = folder_of(name)
    classes = len(visible_folders(parts_of(path)["train"]))
    if classes < 2:
        raise DataError(f"{path} must hold at least two class folders, but has {classes}")
    return classes
