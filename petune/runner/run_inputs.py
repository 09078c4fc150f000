"""Record inputs that the configuration does not pin, and refuse to resume if they changed.

These are the images of a folder or table (`dataset_manifest.json`), and the bytes of the weights file, the recipe's
defaults, the method's options and the way in which images are resized (`inputs.json`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from petune.backbones.weights import find_weights
from petune.base.errors import CheckpointError, DataError, WeightsUnavailable
from petune.data.lookup import manifest_of, pixel_format
from petune.data.manifest import changes
from petune.injector.tuner import TunerConfig
from petune.runner.file_names import INPUTS_FILE, MANIFEST_FILE
from petune.runner.migrations import read_record
from petune.runner.result import RunResult
from petune.runner.run_config import RunConfig
from petune.runner.run_dir import NEW_OUTPUT, write_record

Options = Mapping[str, TunerConfig]
"""All options of each method, defaults included, by the method as it is written."""


@dataclass(frozen=True)
class RunInputs:
    """The inputs of a run, or of several runs that are to be compared.

    Attributes:
        dataset, weights, data_dir: As in the configuration.
        recipe: Learning rate and so on, by name; of a single run only.
        methods: Their options.
        from_run: SHA-256 of the adapter that the run continues from, if it does.
        task: Name, options and targets of the task; of a single run only.
    """

    dataset: str
    weights: str
    data_dir: Path | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    methods: Options = field(default_factory=dict)
    from_run: str = ""
    task: Mapping[str, Any] | None = None


def check_inputs(run_dir: Path, inputs: RunInputs) -> None:
    """Record the inputs of a directory when it starts; check that they are the same when it is continued.

    Args:
        run_dir: Of a run, or of several runs that are to be compared.
        inputs: Of today.

    Raises:
        DataError: The images changed.
        CheckpointError: The weights, the adapter to continue from, the recipe, the task, the options or the way in
            which images are resized changed.
    """
    check_manifest(run_dir, inputs.dataset, inputs.data_dir)
    before = read_record(run_dir / INPUTS_FILE)
    now = {"weights": _digest(inputs.weights), "from_run": inputs.from_run, **inputs.recipe}
    pixels = pixel_format(inputs.dataset, inputs.data_dir) if inputs.recipe else 0
    if before:
        _check_pixels(run_dir, before, pixels)
    _check_recipe(run_dir, inputs.weights, before, now)
    _check_task(run_dir, before.get("task"), inputs.task)
    options = _checked_options(run_dir, before.get("options", {}), inputs.methods)
    merged = {**now, "task": inputs.task, "pixels": pixels or None, **before, "options": options}
    record = {key: value for key, value in merged.items() if value not in ("", None, {})}
    if record != before:
        write_record(run_dir / INPUTS_FILE, record)


def check_pixels_of_runs(runs: Sequence[RunConfig]) -> None:
    """Check that the runs of one table all see the same pixels, if some are finished and others are not.

    Args:
        runs: On the same dataset.

    Raises:
        CheckpointError: The finished ones are of a version of petune that resized images in another way.
    """
    finished = [run.output for run in runs if run.output is not None and RunResult.exists(run.output)]
    if len(finished) in (0, len(runs)):
        return
    pixels = pixel_format(runs[0].dataset, runs[0].data_dir)
    for run_dir in finished:
        _check_pixels(run_dir, read_record(run_dir / INPUTS_FILE), pixels)


def check_manifest(run_dir: Path, dataset: str, data_dir: Path | None = None) -> None:
    """Record the images of a dataset when a directory starts; check that they are the same later.

    Args:
        run_dir: Of a run, or of several runs that are to be compared.
        dataset, data_dir: As in the configuration.

    Raises:
        DataError: They changed.
    """
    now, before = manifest_of(dataset, data_dir), read_record(run_dir / MANIFEST_FILE)
    if now and not before:
        write_record(run_dir / MANIFEST_FILE, now)
    elif now and (changed := changes(before, now)):
        raise DataError(
            f"the images of {dataset} have changed since {run_dir} started: {changed}. Its val and test splits are "
            "drawn from them. Put the images back, or start in a new output",
            cli_hint=NEW_OUTPUT,
        )


def _check_pixels(run_dir: Path, before: Mapping[str, Any], pixels: int) -> None:
    if pixels and before.get("pixels") != pixels:
        raise CheckpointError(
            f"{run_dir} was started by another version of petune, which resized images in another way, and so to other "
            "pixels. Continue it with that version, or start again in another output",
            cli_hint=NEW_OUTPUT,
        )


def _check_recipe(run_dir: Path, weights: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changed = [key for key in now if key in before and now[key] not in ("", before[key])]
    if "weights" in changed:
        raise CheckpointError(
            f"the weights file {weights} has changed since {run_dir} started. Put the old file back, or use another "
            "output",
            cli_hint=NEW_OUTPUT,
        )
    if "from_run" in changed:
        raise CheckpointError(
            f"the adapter that {run_dir} continues from has changed since it started. Put the old one back, or use "
            "another output",
            cli_hint=NEW_OUTPUT,
        )
    if changed:
        values = ", ".join(f"{key} was {before[key]!r} and is {now[key]!r}" for key in changed)
        keys = " and ".join(f"train.{key}" for key in changed)
        raise CheckpointError(
            f"the recipe has changed since {run_dir} started: {values}. The method's package was updated. Install the "
            f"old version, or set {keys} and use another output",
            cli_hint=NEW_OUTPUT,
        )


def _check_task(run_dir: Path, before: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> None:
    """Check that a run continues with the task and the targets that it started with, if it recorded any."""
    changed = [key for key in now if now[key] != before.get(key)] if before and now else []
    if changed:
        assert before is not None
        assert now is not None
        values = ", ".join(f"{key} was {before.get(key)!r} and is {now[key]!r}" for key in changed)
        raise CheckpointError(
            f"the task has changed since {run_dir} started: {values}. Use the same task and dataset, with the same "
            "version of the task's package, or another output",
            cli_hint=NEW_OUTPUT,
        )


def _checked_options(run_dir: Path, before: Mapping[str, Any], methods: Options) -> dict[str, Any]:
    """Return all options on record, new methods added. Options that did not exist at the start are ignored."""
    options = dict(before)
    for method, config in methods.items():
        now = config.plain()
        recorded = options.setdefault(method, now)
        pairs = [(key, value, now.get(key)) for key, value in recorded.items()]
        changed = [f"{key} was {old!r} and is {new!r}" for key, old, new in pairs if old != new]
        if changed:
            raise CheckpointError(
                f"the options of {method} have changed since {run_dir} started: {', '.join(changed)}. The method's "
                "package was updated. Install the old version, or use another output",
                cli_hint=NEW_OUTPUT,
            )
    return options


def _digest(weights: str) -> str:
    """Return the SHA-256 of a weights file; empty if the weights are no file, as `none`."""
    try:
        with find_weights(Path(weights)).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (WeightsUnavailable, OSError):  # a missing file is reported where it is read
        return ""
