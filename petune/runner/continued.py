"""Continue from a finished run, with more epochs or on another dataset.

The new run takes method, options and backbone from the old one, and starts from the values that it trained. Its
optimizer, schedule and training options are its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from petune.adapters.format import TENSOR_FILE, SavedAdapter
from petune.base.errors import CheckpointError, ConfigError, Problem
from petune.base.text import plural
from petune.data.lookup import dataset_target
from petune.injector.registry import build_tuner
from petune.runner.file_names import CONFIG_FILE
from petune.runner.migrations import read_config
from petune.runner.run_adapter import read_run_adapter, run_dir_of, user_code_of
from petune.runner.run_config import RunConfig
from petune.runner.split_options import read_split_options
from petune.training.task import Task
from petune.training.task_registry import restore_task

DATA_KEYS = ("dataset", "task", "data_dir", "on_broken", "channels", "val_fraction", "shots", "seed", "folds", "fold")
"""Options that choose the images and the task. The old run's are taken together, so that its val images stay in val."""
RECORDED_KEYS = {
    "backbone": "name",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "backbone_options": "options",
    "head": "head",
}
"""Options that the adapter's metadata records about its backbone, and their names there."""
Run = TypeVar("Run", bound=RunConfig)


def complete_from_run(config: Run, *, with_data: bool = True) -> Run:
    """Return a configuration with what it leaves open filled in from the run in `from_run`, if it names one.

    Args:
        config: A run, or what the runs of a comparison share.
        with_data: Take the options of its images, too.

    Raises:
        ConfigError: It contradicts that run, or the run's backbone is built by code of others.
        CheckpointError: There is no finished run.
    """
    if config.from_run is None:
        return config
    saved = read_run_adapter(config.from_run)
    given = config.model_dump(exclude_unset=True)
    _check_trusted(saved, given)
    recorded = _recorded_backbone(saved) | {"method": saved.config["metadata"].get("method", saved.config["tuner"])}
    data = _data_options(saved) if with_data else {}
    if with_data and given.get("dataset", data["dataset"]) != data["dataset"]:
        data = _task_options(data, saved, config)
    elif with_data:
        _check_one_division(config.from_run, saved)
    _check_val(config.from_run, given, data)
    if saved.config["metadata"]["backbone"].get("channels") == 1:  # RGB images are converted for it
        data = {"channels": 1, **data}
    given["from_run"] = config.from_run.absolute()
    complete = type(config).build({**data, **recorded, **given}, f"{config.from_run} and the given values")
    check_same_model(complete, saved)
    return complete


def _task_options(data: Mapping[str, Any], saved: SavedAdapter, config: RunConfig) -> dict[str, Any]:
    """Return the old run's task for another dataset with the same kind of targets."""
    kind = dataset_target(config.dataset, config.data_dir).kind
    is_same_kind = restore_task(saved.config["metadata"]).target_kind == kind
    return {"task": data["task"]} if is_same_kind and "task" in data else {}


def _check_one_division(from_run: Path, saved: SavedAdapter) -> None:
    """Check that the runs of an average divided their images in one way: otherwise some trained on the others' test.

    Raises:
        ConfigError: They had other folds, or other fractions of val.
    """
    recorded = read_split_options(saved.config["metadata"], None)  # an average has no run directory
    different = [key for key in ("fold", "folds", "val_fraction") if recorded is not None and key not in recorded]
    if different:
        raise ConfigError(
            f"{from_run} averages runs of different {different[0]}, so each trained on val or test images of another. "
            "Name another dataset, or average runs with the same images in each split",
            cli_hint="Name another dataset with --dataset",
        )


def _check_val(from_run: Path, given: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    """Refuse a larger val split of the same dataset: it would hold images that the earlier run trained on.

    Raises:
        ConfigError: It is larger.
    """
    before = data.get("val_fraction")
    if before is not None and given.get("val_fraction", before) > before:
        raise ConfigError(
            f"val_fraction is {given['val_fraction']}, and that of {from_run} is {before}: val would hold images that "
            f"it trained on. Use at most {before}, or leave it out",
            cli_hint="Drop --val-fraction",
        )


def earlier_runs(config: RunConfig) -> list[tuple[Path, RunConfig]]:
    """Return path and configuration of the runs that one continues, the latest first, of those that are still there.

    Raises:
        CheckpointError: There is no adapter in `from_run`.
    """
    if config.from_run is None:
        return []
    start = read_run_adapter(config.from_run)
    *before, _ = history(start)
    paths = [Path(entry["path"]) for entry in reversed(before) if _is_unchanged(entry)]
    every = [(config.from_run, start), *((path, read_run_adapter(path)) for path in paths)]
    configs = [(path, _config_of(saved)) for path, saved in every]
    return [(path, found) for path, found in configs if found is not None]


def _is_unchanged(entry: Mapping[str, Any]) -> bool:
    """Return True if an adapter of the history is still where it was: another one there says nothing about it."""
    file = Path(entry["path"]) / TENSOR_FILE
    return file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == entry.get("sha256")


def _config_of(saved: SavedAdapter) -> RunConfig | None:
    """Return the configuration of the run that saved an adapter; None if only the adapter is left."""
    directory = run_dir_of(saved.path, saved.config["metadata"])
    if directory is None:
        return None
    return RunConfig.build(read_config(directory / CONFIG_FILE), str(directory / CONFIG_FILE))


def check_same_model(config: RunConfig, saved: SavedAdapter) -> None:
    """Check that a complete configuration has the method and the backbone of the adapter that it continues from.

    Raises:
        ConfigError: It has others. Weights may be elsewhere now: their content is checked when they are loaded.
    """
    recorded = _recorded_backbone(saved)
    given = {key: getattr(config, key) for key in recorded if key != "weights"}
    problems = [
        Problem(key, f"{key}: {recorded[key]!r} there, {value!r} here")
        for key, value in given.items()
        if recorded[key] != value
    ]
    problems += _changed_method(config.method, saved)
    if problems:
        raise ConfigError(
            f"these values contradict {config.from_run}:"
            + "".join(f"\n  - {problem.message}" for problem in problems)
            + "\nLeave them out to take them from that run, or start without it",
            tuple(problems),
        )


def keeps_head(saved: SavedAdapter, task: Task[Any]) -> bool:
    """Return whether an adapter was trained for the same task and classes, in the same order."""
    before = restore_task(saved.config["metadata"])
    return (before.name, before.target.kind, before.target.names) == (task.name, task.target.kind, task.target.names)


def keep_head_state(task: Task[Any], saved: SavedAdapter) -> None:
    """Give a task what the outputs of an adapter's head depend on, such as the mean of the numbers that it trained on.

    Args:
        task: Fitted to the new images; changed in place.
        saved: The adapter whose head is continued.
    """
    before = restore_task(saved.config["metadata"]).state
    kept = {key: before[key] for key in task.head_state if key in before}
    if kept:
        task.bind(task.target, {**task.state, **kept})


def tensors_digest(saved: SavedAdapter) -> str:
    """Return the SHA-256 of an adapter's file of tensors."""
    return hashlib.sha256((saved.path / TENSOR_FILE).read_bytes()).hexdigest()


def history(saved: SavedAdapter) -> list[dict[str, Any]]:
    """Return what a continued run records about the runs before it, the first one first."""
    metadata = saved.config["metadata"]
    training = metadata.get("training")
    entry = {
        "path": str(saved.path.absolute()),
        "sha256": tensors_digest(saved),
        "dataset": metadata.get("dataset"),
        "epochs": training.get("epochs") if isinstance(training, Mapping) else None,
    }
    earlier = metadata.get("continued_from")
    return [*(earlier if isinstance(earlier, list) else ()), entry]


def describe_start(saved: SavedAdapter) -> str:
    """Return `runs/pets/adapter (folder:pets, 10 epochs)`."""
    entry = history(saved)[-1]
    facts = [entry["dataset"], entry["epochs"] and plural(entry["epochs"], "epoch")]
    return f"{saved.path} ({', '.join(str(fact) for fact in facts if fact)})"


def _check_trusted(saved: SavedAdapter, given: Mapping[str, Any]) -> None:
    name = user_code_of(saved)
    if name and not {"backbone", "backbone_options"} & given.keys():
        raise ConfigError(
            f"{saved.path} has a backbone that is built by {name}, code that would run here. If you trust that code, "
            f"name it: backbone={name!r}",
            cli_hint=f"Add --backbone {name} if you trust it",
        )


def _recorded_backbone(saved: SavedAdapter) -> dict[str, Any]:
    recorded = saved.config["metadata"]["backbone"]
    try:
        weights = recorded.get("weights_option", "default")
        added = {"weights": weights, "base_precision": recorded.get("base_precision", "auto")}
        return {key: recorded[name] for key, name in RECORDED_KEYS.items()} | added
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{saved.path} does not record how its backbone was built: {error!r}") from None


def _data_options(saved: SavedAdapter) -> dict[str, Any]:
    """Return the options of the old run that choose its images; those that are recorded if its directory is gone."""
    metadata = saved.config["metadata"]
    directory = run_dir_of(saved.path, metadata)
    if directory is None:
        recorded = read_split_options(metadata, None) or {}
        kept = {key: recorded[key] for key in {"val_fraction", "on_broken", "folds", "fold"} & recorded.keys()}
        return {**kept, "dataset": metadata.get("dataset")}
    stored = read_config(directory / CONFIG_FILE)
    return {key: stored[key] for key in DATA_KEYS if key in stored}


def _changed_method(method: str, saved: SavedAdapter) -> list[Problem]:
    tuner = build_tuner(method)
    if tuner.method != saved.config["tuner"]:
        return [Problem("method", f"method: {saved.config['tuner']!r} there, {method!r} here")]
    options = tuner.config.plain()
    changed = {key: value for key, value in saved.config["config"].items() if options.get(key) != value}
    return [
        Problem("method", f"method {method}: {key} is {value!r} there, {options.get(key)!r} here")
        for key, value in changed.items()
    ]
