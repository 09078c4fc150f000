"""Find out about a dataset without decoding an image: its classes, its place, and if its files are a run's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from petune.base.errors import DataError, PetuneError
from petune.base.plugins import plugin_errors
from petune.data.manifest import Manifest, digest, digests
from petune.data.reader import DatasetReader, ReadContext
from petune.data.registry import DATASETS, build_reader, data_dir_or_default
from petune.data.squares import PIXEL_FORMAT
from petune.data.target import Target


def find_dataset(name: str, data_dir: Path | None = None) -> str | None:
    """Return where `load_dataset` would read a dataset from, or None if it would download it or there is none.

    Args:
        name: As for `load_dataset`.
        data_dir: As for `load_dataset`.
    """
    reader = build_reader(name)
    with plugin_errors(DATASETS, reader.name, type(reader), "was looked for"):
        return reader.find(data_dir_or_default(data_dir))


def dataset_target(name: str, data_dir: Path | None = None) -> Target:
    """Return kind and names of a dataset's targets.

    Raises:
        UnknownName: There is no such dataset.
        DataError: It does not exist, or its targets are not clear.
    """
    reader = build_reader(name)
    with plugin_errors(DATASETS, reader.name, type(reader), "was asked for its targets"):
        return reader.target(ReadContext(data_dir=data_dir_or_default(data_dir)))


def dataset_frames(name: str, data_dir: Path | None = None, frames: int | None = None) -> int | None:
    """Return the number of frames of a clip that a dataset gives; None if its samples are images.

    Args:
        name, data_dir: As for `load_dataset`.
        frames: Frames that the backbone takes; None if it takes images.

    Raises:
        UnknownName: There is no such dataset.
    """
    reader = build_reader(name)
    directory = data_dir_or_default(data_dir)
    context = ReadContext(data_dir=directory) if frames is None else ReadContext(data_dir=directory, frames=frames)
    with plugin_errors(DATASETS, reader.name, type(reader), "was asked for its frames"):
        return reader.num_frames(context)


def count_classes(name: str, data_dir: Path | None = None) -> int:
    """Return the number of classes of a dataset, or of numbers that it has per image.

    Raises:
        UnknownName: There is no such dataset.
        DataError: The folder does not exist or has fewer than two classes.
    """
    return len(dataset_target(name, data_dir).names)


def manifest_of(name: str, data_dir: Path | None = None) -> Manifest:
    """Return the manifest of a dataset, without reading any image; a copy of a folder has the same manifest.

    Args:
        name: As in a config; the manifest is empty if its images never change, or the folder does not exist here.
        data_dir: As for `load_dataset`.

    Raises:
        DataError: The layout is wrong.
    """
    return _manifest(build_reader(name), data_dir)


def pixel_format(name: str, data_dir: Path | None = None) -> int:
    """Return the number of the way in which a dataset's images are resized; 0 if they are stored as they are.

    Args:
        name: As in a config.
        data_dir: As for `load_dataset`.
    """
    reader = build_reader(name)
    with plugin_errors(DATASETS, reader.name, type(reader), "was asked for its images"):
        return PIXEL_FORMAT if reader.resizes(data_dir_or_default(data_dir)) else 0


def is_training_dataset(name: str, trained_on: str, trained_digests: Mapping[str, Any]) -> bool:
    """Return True if a dataset is the one that a run used, or a copy of its files.

    Args:
        name: As in a config.
        trained_on: The dataset of the run, as in its config.
        trained_digests: `digests` of the run's manifest.
    """
    if name == trained_on:
        return True
    reader = build_reader(name)
    try:
        trained = build_reader(trained_on)
    except PetuneError:  # its package is gone
        return False
    if type(reader) is not type(trained):
        return False
    same_options = bool(reader.config == trained.config)
    if reader.path is None or trained.path is None:
        return same_options and reader.argument_value == trained.argument_value
    if same_options and reader.path.resolve() == trained.path.resolve():
        return True
    try:
        manifest = _manifest(reader, None)
    except DataError:  # nothing to train on, such as a folder with test/ alone
        return False
    return bool(trained_digests) and digests(manifest) == dict(trained_digests)


def check_training_images(name: str, trained_digests: Mapping[str, Any], data_dir: Path | None = None) -> None:
    """Check that the test and val images of a run can still be told from its training images.

    Args:
        name: The dataset of the run.
        trained_digests: `digests` of the run's manifest.
        data_dir: As for `load_dataset`.

    Raises:
        DataError: The training images changed, or there are other splits.
    """
    manifest = manifest_of(name, data_dir)
    if not trained_digests or not manifest:
        return
    same_splits = manifest.keys() == trained_digests.keys()
    if not same_splits or digest(manifest["train"]) != trained_digests.get("train"):
        raise DataError(
            f"the training images of {name} changed since the run, so its test split may now contain some of them. "
            "Put the images back, or evaluate on images that the run never saw: dataset='folder:PATH'",
            cli_hint="Name other images with --dataset folder:PATH",
        )


def _manifest(reader: DatasetReader[Any], data_dir: Path | None) -> Manifest:
    with plugin_errors(DATASETS, reader.name, type(reader), "listed its files"):
        return reader.manifest(data_dir_or_default(data_dir))
