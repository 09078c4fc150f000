"""Load a dataset by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from petune.base.arguments import check_arguments
from petune.base.entry_points import OWN
from petune.base.errors import ConfigError, DataError, PluginError
from petune.base.plugins import plugin_errors
from petune.data.cache import CACHE_GB
from petune.data.dataset import FRAMES, Dataset, OnBroken
from petune.data.reader import DatasetReader, ReadContext
from petune.data.registry import DATASETS, build_reader, data_dir_or_default


def load_dataset(
    name: str,
    data_dir: str | Path | None = None,
    image_size: int = 224,
    on_broken: OnBroken = "error",
    channels: int | None = None,
    cache_gb: float = CACHE_GB,
    frames: int = FRAMES,
) -> Dataset:
    """Load a dataset.

    Args:
        name: A name that `list_datasets` lists, with its argument and options, or the path of a folder or table.
        data_dir: Directory of downloaded datasets. Defaults to `PETUNE_DATA`, then to the cache directory.
        image_size: Side, in pixels, at which the images will be used.
        on_broken: What to do with an image that cannot be decoded.
        channels: Channels that the backbone takes; None if it takes RGB.
        cache_gb: Splits whose decoded images are larger, in 10⁹ bytes, are decoded each time they are read.
        frames: Frames of a clip that the backbone takes, for datasets of videos.

    Raises:
        UnknownName: There is no such dataset.
        DataError: The dataset is missing, broken or inconsistent.
        PluginError: The package that brings it is broken.
        ConfigError: An argument makes no sense.
    """
    _check(name, data_dir, image_size, on_broken, channels, cache_gb)
    check_arguments("petune.load_dataset", frames=(frames, int))
    if frames < 1:
        raise ConfigError(f"frames is {frames}. Use a number from 1")
    root = data_dir_or_default(Path(data_dir) if data_dir else None)
    return read_dataset(name, ReadContext(image_size, root, on_broken, channels, cache_gb, frames=frames))


def load_readable(name: str, data_dir: str | Path | None, image_size: int) -> Dataset:
    """Load a dataset to look at it; images that cannot be decoded are left out, however many, and named in `source`.

    Args:
        name, data_dir, image_size: See `load_dataset`.

    Raises:
        PetuneError: See `load_dataset`.
    """
    try:
        return load_dataset(name, data_dir, image_size)  # as a run reads it, so that it is decoded into the cache once
    except DataError as error:
        if not error.broken:
            raise
    root = data_dir_or_default(Path(data_dir) if data_dir else None)
    return read_dataset(name, ReadContext(image_size, root, "skip", max_broken=1.0))


def read_dataset(name: str, context: ReadContext) -> Dataset:
    """Load a dataset; see `load_dataset`."""
    reader = build_reader(name)
    with plugin_errors(DATASETS, reader.name, type(reader), "was read"):
        dataset = reader.load(context)
    if not isinstance(dataset, Dataset):
        raise PluginError(
            f"{type(reader).__module__}.{type(reader).__name__}.load returned a {type(dataset).__name__}, not a "
            "petune.Dataset. Update or remove the package that brings it"
        )
    with plugin_errors(DATASETS, reader.name, type(reader), "was checked"):
        _check_target(reader, context, dataset)
        return dataset.validated()


def _check_target(reader: DatasetReader[Any], context: ReadContext, dataset: Dataset) -> None:
    """Check that a plugin names its targets before it reads images as after; the head is built for those before."""
    cls = type(reader)
    if cls.target is DatasetReader.target or cls.__module__.partition(".")[0] == OWN:
        return
    before = reader.target(context)
    if before != dataset.target:
        raise PluginError(
            f"{cls.__module__}.{cls.__name__}.target returned {before.kind} {list(before.names[:5])}, and load "
            f"{dataset.target.kind} {list(dataset.target.names[:5])}. Update or remove the package that brings it"
        )


def _check(name: object, data_dir: object, image_size: int, on_broken: object, channels: int | None, gb: float) -> None:
    check_arguments(
        "petune.load_dataset",
        name=(name, str),
        data_dir=(data_dir, str | Path | None),
        image_size=(image_size, int),
        on_broken=(on_broken, str),
        channels=(channels, int | None),
        cache_gb=(gb, int | float),
    )
    if image_size < 1:
        raise ConfigError(f"image_size is {image_size}. Use a side in pixels, from 1")
    if channels is not None and channels < 1:
        raise ConfigError(f"channels is {channels}. Use a number from 1")
    if not gb >= 0:
        raise ConfigError(f"cache_gb is {gb}. Use a size in 10⁹ bytes, from 0")
    if on_broken not in get_args(OnBroken):
        raise ConfigError(f"on_broken is {on_broken!r}. Use {' or '.join(map(repr, get_args(OnBroken)))}")
