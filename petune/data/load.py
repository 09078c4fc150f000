"""Load a dataset by name."""

from __future__ import annotations

from pathlib import Path

from petune.base.errors import PluginError
from petune.base.plugins import plugin_errors
from petune.data.cache import CACHE_GB
from petune.data.dataset import Dataset, OnBroken
from petune.data.reader import ReadContext
from petune.data.registry import DATASETS, build_reader, data_dir_or_default


def load_dataset(
    name: str,
    data_dir: Path | None = None,
    image_size: int = 224,
    on_broken: OnBroken = "error",
    channels: int | None = None,
    cache_gb: float = CACHE_GB,
) -> Dataset:
    """Load a dataset.

    Args:
        name: A name that `list_datasets` lists, with its argument and options, or the path of a folder or table.
        data_dir: Directory of downloaded datasets. Defaults to `PETUNE_DATA`, then to the cache directory.
        image_size: Side, in pixels, at which the images will be used.
        on_broken: What to do with an image that cannot be decoded.
        channels: Channels that the backbone takes; None if it takes RGB.
        cache_gb: Splits whose decoded images are larger, in 10⁹ bytes, are decoded each time they are read.

    Raises:
        UnknownName: There is no such dataset.
        DataError: The dataset is missing, broken or inconsistent.
        PluginError: The package that brings it is broken.
    """
    reader = build_reader(name)
    with plugin_errors(DATASETS, reader.name, type(reader), "was read"):
        dataset = reader.load(ReadContext(image_size, data_dir_or_default(data_dir), on_broken, channels, cache_gb))
    if not isinstance(dataset, Dataset):
        raise PluginError(
            f"{type(reader).__module__}.{type(reader).__name__}.load returned a {type(dataset).__name__}, not a "
            "petune.Dataset. Update or remove the package that brings it"
        )
    return dataset.validated()
