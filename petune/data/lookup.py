"""Find a dataset and its number of classes without decoding an image."""

from __future__ import annotations

from pathlib import Path

from petune.base.errors import DataError, UnknownName
from petune.base.text import plural
from petune.data.cache import cache_dir
from petune.data.cifar import published_files
from petune.data.cifar_parquet import parquet_files
from petune.data.find_images import visible_subfolders
from petune.data.layout import folder_path
from petune.data.load import DATASETS, FOLDER_HINT, default_data_dir
from petune.data.splits import split_folders

NUM_CLASSES = {"cifar10": 10, "cifar100": 100, "digits": 10}


def find_dataset(name: str, data_dir: Path | None = None) -> str | None:
    """Return where `load_dataset` would read a dataset from, or None if it would download it.

    Args:
        name: `cifar10`, `cifar100` or `digits`.
        data_dir: As for `load_dataset`.
    """
    if name == "digits":
        return "scikit-learn"
    if name not in NUM_CLASSES:
        return None
    for root in (data_dir or default_data_dir(), cache_dir() / "data"):
        if root is None:
            continue
        published = published_files(name, root)
        if published:
            return str(published[0])
        parquet = parquet_files(name, root)
        if parquet is not None:
            return str(parquet["train"][0].parent)
    return None


def count_classes(name: str) -> int:
    """Return the number of classes of a dataset.

    Raises:
        UnknownName: There is no such dataset.
        DataError: The folder does not exist or has fewer than two classes.
    """
    if name in NUM_CLASSES:
        return NUM_CLASSES[name]
    if not name.startswith("folder:"):
        raise UnknownName("dataset", name, DATASETS, FOLDER_HINT)
    path = folder_path(name)
    num_classes = len(visible_subfolders(split_folders(path)["train"]))
    if num_classes < 2:
        raise DataError(f"{path} has {plural(num_classes, 'class folder')}. A dataset needs at least two")
    return num_classes
