"""What a run began with that its configuration does not say: it goes on with the same, or not at all."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from petune.backbones.weights import find_weights
from petune.base.errors import CheckpointError, DataError, WeightsUnavailable
from petune.data.manifest import MANIFEST_FILE, changes, manifest_of
from petune.injector.tuner import TunerConfig
from petune.runner.run_dir import INPUTS_FILE, note, noted


def check_inputs(
    place: Path,
    dataset: str,
    weights: str,
    recipe: Mapping[str, Any] | None = None,
    methods: Mapping[str, TunerConfig] | None = None,
) -> None:
    """Note in a directory what it begins with, or hold that it is still the same.

    That is the images of a folder, the bytes of a weights file, and what a method's package fills in.

    Args:
        place: Of a run, or of many runs that are to be compared.
        dataset, weights: As in a configuration.
        recipe: Learning rate and so on, by name; a run's.
        methods: All options, those not asked for too, by the method as it is written.

    Raises:
        DataError: The images changed.
        CheckpointError: The weights, the recipe or the options did.
    """
    check_manifest(place, dataset)
    before, now = noted(place / INPUTS_FILE), {"weights": _digest(weights), **(recipe or {})}
    options = {method: asked.plain() for method, asked in (methods or {}).items()} | before.get("options", {})
    for method, asked in (methods or {}).items():
        _hold_options(place, method, options[method], asked.plain())
    changed = [key for key in now if key in before and now[key] not in ("", before[key])]
    if "weights" in changed:
        raise CheckpointError(
            f"{weights} must be the weights that {place} began with, but the file holds others now. Put them back, or "
            "name another --output"
        )
    if changed:
        said = ", ".join(f"{key} was {before[key]!r} and is {now[key]!r}" for key in changed)
        raise CheckpointError(
            f"{place} must go on with the recipe that it began with, but {said}: the method's package has changed. "
            f"Ask for {' and '.join(f'train.{key}' for key in changed)} by --set in another --output, or install what "
            "there was"
        )
    known = {key: value for key, value in {**now, **before, "options": options}.items() if value not in ("", None, {})}
    if known != before:
        note(place / INPUTS_FILE, known)


def check_manifest(run_dir: Path, dataset: str) -> None:
    """Record which images a directory starts with, or check that they are still the same.

    Args:
        run_dir: The directory of a run, or of several runs that are to be compared.
        dataset: As in a configuration.

    Raises:
        DataError: They changed.
    """
    now, before = manifest_of(dataset), noted(run_dir / MANIFEST_FILE)
    if now and not before:
        note(run_dir / MANIFEST_FILE, now)
    elif now and (changed := changes(before, now)):
        raise DataError(
            f"the images of {dataset} have changed since {run_dir} started: {changed}. Its val and test splits are "
            "drawn from them. Put the images back, or start in a new output",
            cli_hint="Name a new directory with --output",
        )


def _hold_options(place: Path, method: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """An option that was not there yet changes nothing, if its default is what was done before."""
    changed = [f"{key} was {value!r} and is {now.get(key)!r}" for key, value in before.items() if now.get(key) != value]
    if changed:
        raise CheckpointError(
            f"{place} must go on with the options of {method} that it began with, but {', '.join(changed)}: the "
            "method's package has changed. Ask for them in another --output, or install what there was"
        )


def _digest(weights: str) -> str:
    """SHA-256 of the file that the weights are; empty where they are none."""
    try:
        with find_weights(Path(weights)).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (WeightsUnavailable, OSError):  # no file, as `none`; what is wrong with one is said where it is read
        return ""
