"""From single runs to rows of a table: runs that differ in nothing but the seed are one row."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from petune.base.metric import Metric
from petune.runner.comparison import summarize
from petune.runner.file_names import INPUTS_FILE, MANIFEST_FILE
from petune.runner.migrations import read_record
from petune.runner.report.find_runs import RunDirectory
from petune.runner.result import RunResult
from petune.runner.stored_config import flatten
from petune.training.task_registry import AUTO_TASK
from petune.training.tasks.classification import Classification

MAY_DIFFER = {"seed", "output", "resume"}
"""Keys in which the runs of one row differ."""
BACKBONE_KEYS = ("weights", "image_size", "patch_size", "backbone_options", "head")
"""Keys that make another backbone of one with the same name."""


def rows_of(runs: Sequence[RunDirectory]) -> list[dict[str, Any]]:
    """Return one row for the finished runs that differ only in the seed; inputs on record count as well.

    A seed that ran twice is counted once.
    """
    groups: dict[tuple[str, str], dict[int, RunResult]] = {}
    labels = labels_of(runs)
    for run in runs:
        if run.result is None:
            continue
        records = [read_record(run.path / name) for name in (MANIFEST_FILE, INPUTS_FILE)]
        same = [run.result.lr, run.result.weights, _settings(run), records]
        key = labels[run.path], json.dumps(same, sort_keys=True, default=str)
        groups.setdefault(key, {}).setdefault(run.result.seed, run.result)
    return [summarize(label, list(by_seed.values())).model_dump() for (label, _), by_seed in groups.items()]


def metric_info_of(runs: Sequence[RunDirectory]) -> tuple[Metric, ...]:
    """Return how to show the metrics of runs with the same task."""
    return next((run.result.metric_info for run in runs if run.result), Classification.metrics)


def labels_of(runs: Sequence[RunDirectory]) -> dict[Path, str]:
    """Return each run's method, with the settings in which it differs from other runs of that method."""
    settings = {run.path: flatten(_settings(run)) for run in runs}
    labels = {}
    for run in runs:
        method = method_of(run)
        same_method = [settings[other.path] for other in runs if method_of(other) == method]
        differing = [
            f"{key.removeprefix('train.')}={settings[run.path].get(key)}"
            for key in dict.fromkeys(key for other in same_method for key in other)
            if key != "method" and len({str(other.get(key)) for other in same_method}) > 1
        ]
        labels[run.path] = f"{method} ({', '.join(differing)})" if differing else method
    return labels


def method_of(run: RunDirectory) -> str:
    """Return the method of a run, finished or not."""
    return run.result.method if run.result else str(run.config.get("method", run.path.name))


def subject_of(run: RunDirectory) -> str:
    """Return `vit_base on cifar10`."""
    source = run.result.model_dump() if run.result else run.config
    return f"{source.get('backbone', '?')} on {source.get('dataset', '?')}"


def backbone_of(run: RunDirectory) -> tuple[str, ...]:
    """Return what tells a run's backbone from others of the same name."""
    return tuple(str(run.config.get(key, "")) for key in BACKBONE_KEYS)


def task_of(run: RunDirectory) -> tuple[str, ...]:
    """Return what tells a run's task, and the metric that chose its epoch, from others."""
    train = run.config.get("train")
    choose = train.get("choose") if isinstance(train, dict) else None
    return str(run.config.get("task", AUTO_TASK)), str(choose or "")


def shared_config(runs: Sequence[RunDirectory]) -> dict[str, Any]:
    """Return the keys of the configuration that all runs have in common."""
    first = runs[0].config
    return {key: value for key, value in first.items() if all(run.config.get(key) == value for run in runs)}


def _settings(run: RunDirectory) -> dict[str, Any]:
    return {key: value for key, value in run.config.items() if key not in MAY_DIFFER}
