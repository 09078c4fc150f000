"""Manifest of a folder dataset. The val/test split depends on it, so a changed folder must not be resumed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from petune.base.errors import DataError
from petune.base.text import plural
from petune.data.find_images import size_and_time
from petune.data.layout import folder_path, list_images
from petune.data.splits import split_folders

Manifest = dict[str, dict[str, str]]
"""Split, then class, to the number of images and a digest of their names and sizes, such as `61 3f0c…`."""


def manifest_of(dataset: str) -> Manifest:
    """Return the manifest of a folder, without reading any image; a copy of the folder has the same manifest.

    Args:
        dataset: As in a config; the manifest is empty if it is not a folder, or the folder does not exist here.

    Raises:
        DataError: The layout is wrong: see `petune.data.folder`.
    """
    if not dataset.startswith("folder:") or not folder_path(dataset).is_dir():
        return {}
    folders = split_folders(folder_path(dataset))
    splits, _ = list_images(folder_path(dataset))
    return {
        part: {name: _class_entry(images, folders[part] / name) for name, images in classes.items()}
        for part, classes in splits.items()
    }


def digests(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return one digest per split of a manifest, for the record."""
    return {part: _digest(classes) for part, classes in manifest.items()}


def changes(before: Mapping[str, Any], now: Manifest) -> str:
    """Describe the first three differences between two manifests; empty if there is none."""
    differences = []
    for part in dict.fromkeys([*before, *now]):
        old, new = before.get(part, {}), now.get(part, {})
        for name in dict.fromkeys([*old, *new]):
            if old.get(name) != new.get(name):
                differences.append(f"{part}/{name} {_change(str(old.get(name, '0')), new.get(name, '0'))}")
    more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
    return ", ".join(differences[:3]) + more


def _change(old: str, new: str) -> str:
    old_count, new_count = old.split()[0], new.split()[0]
    return (
        f"had {plural(int(old_count), 'image')}, has {new_count}{' different ones' if old_count == new_count else ''}"
    )


def is_training_dataset(dataset: str, trained_on: str, trained_digests: Mapping[str, Any]) -> bool:
    """Return True if a dataset is the one that a run used, or a copy of its folder.

    Args:
        dataset: As in a config.
        trained_on: The dataset of the run, as in its config.
        trained_digests: `digests` of the run's manifest.
    """
    if not (dataset.startswith("folder:") and trained_on.startswith("folder:")):
        return dataset == trained_on
    if folder_path(dataset).resolve() == folder_path(trained_on).resolve():
        return True
    try:
        manifest = manifest_of(dataset)
    except DataError:  # not a folder to train on, such as test/ alone
        return False
    return bool(trained_digests) and digests(manifest) == dict(trained_digests)


def check_training_images(dataset: str, trained_digests: Mapping[str, Any]) -> None:
    """Check that the test and val images of a run can still be told from its training images.

    Args:
        dataset: The dataset of the run.
        trained_digests: `digests` of the run's manifest.

    Raises:
        DataError: The training images changed, or the folder has other splits.
    """
    manifest = manifest_of(dataset)
    if not trained_digests or not manifest:
        return
    same_splits = manifest.keys() == trained_digests.keys()
    if not same_splits or _digest(manifest["train"]) != trained_digests.get("train"):
        raise DataError(
            f"the training images of {dataset} changed since the run, so its test split may now contain some of them. "
            "Put the images back, or evaluate on images that the run never saw: dataset='folder:PATH'",
            cli_hint="Name other images with --dataset folder:PATH",
        )


def _class_entry(images: Sequence[Path], folder: Path) -> str:
    files = [(str(path.relative_to(folder)), size_and_time(path)[0]) for path in images]
    return f"{len(images)} {_digest(files)}"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
