"""Which images of a folder a run began with: val and test are drawn from them, and anew where they change."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from petune.base.errors import DataError
from petune.data.layout import folder_of, image_files, parts_of, size_and_time

MANIFEST_FILE = "dataset_manifest.json"
"""Name of the manifest in a run directory; the runner writes it."""

Manifest = dict[str, dict[str, str]]
"""Split, then class, to the number of images and a digest of their names and sizes, as `61 3f0c…`."""


def manifest_of(dataset: str) -> Manifest:
    """What a folder holds now, in a moment: no image is read. A folder that was copied holds the same.

    Args:
        dataset: As in a configuration; what is no folder, or not here, holds nothing.

    Raises:
        DataError: The layout is wrong: see `petune.data.folder`.
    """
    if not dataset.startswith("folder:") or not folder_of(dataset).is_dir():
        return {}
    places, (found, _) = parts_of(folder_of(dataset)), image_files(folder_of(dataset))
    return {
        part: {name: _said(images, places[part] / name) for name, images in files.items()}
        for part, files in found.items()
    }


def digests(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return one digest per split of a manifest, for the record."""
    return {part: _digest(classes) for part, classes in manifest.items()}


def changes(before: Mapping[str, Any], now: Manifest) -> str:
    """Describe the first three differences between two manifests; empty if there is none."""
    found = []
    for part in dict.fromkeys([*before, *now]):
        old, new = before.get(part, {}), now.get(part, {})
        for name in dict.fromkeys([*old, *new]):
            had, has = str(old.get(name, "0")).split()[0], new.get(name, "0").split()[0]
            if old.get(name) != new.get(name):
                found.append(f"{part}/{name} had {had}, has {has}" + (" others" if had == has else ""))
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def same_images(dataset: str, own: str, before: Mapping[str, Any]) -> bool:
    """Whether a dataset is a run's own, or a copy of its folder: some of it was trained on.

    Args:
        dataset, own: As in a configuration.
        before: What `digests` said of the run's.
    """
    if not (dataset.startswith("folder:") and own.startswith("folder:")):
        return dataset == own
    if folder_of(dataset).resolve() == folder_of(own).resolve():
        return True
    try:
        now = manifest_of(dataset)
    except DataError:  # no folder to train on, as test/ alone
        return False
    return bool(before) and digests(now) == dict(before)


def refuse_trained_on(dataset: str, before: Mapping[str, Any]) -> None:
    """Hold that the run's own test and val images can still be told from those it trained on.

    Args:
        dataset: The run's.
        before: What `digests` said then.

    Raises:
        DataError: The training images changed, or there are other splits.
    """
    now = manifest_of(dataset)
    if before and now and (now.keys() != before.keys() or _digest(now["train"]) != before.get("train")):
        raise DataError(
            f"the training images of {dataset} must be those that the run had, since otherwise some of them may be "
            "among its test images now, but they changed. Put them back, or name images that it never saw: "
            "--dataset folder:PATH"
        )


def _said(images: Sequence[Path], place: Path) -> str:
    return f"{len(images)} {_digest([(str(p.relative_to(place)), size_and_time(p)[0]) for p in images])}"


def _digest(what: Any) -> str:
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
