"""The work of one trial: train, and read validation only."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from petune.base.config import Config
from petune.base.errors import ConfigError, UsageError
from petune.base.files import replace_file
from petune.base.metric import Metric
from petune.runner.executors import Work
from petune.runner.file_names import TRIAL_FILE
from petune.runner.migrations import updated_fit
from petune.runner.prepare import RunContext
from petune.runner.provenance import provenance
from petune.runner.run import fine_tuning, train
from petune.runner.run_config import RunConfig
from petune.runner.run_dir import open_run_dir
from petune.runner.trained import Trained
from petune.training.events import Event
from petune.training.stop import StopFlag


class Fit(Config):
    """Measurements of a trial, without a test; saved as `trial.json`."""

    task: str
    val_metrics: dict[str, float]
    metric_info: tuple[Metric, ...]
    epoch: int
    lr: float
    tuned: int
    head: int
    percent_of_backbone: float
    images_per_s: float
    time_s: float
    backbone: str
    weights: str
    provenance: dict[str, Any]


def _fit(config: RunConfig, watch: Callable[[Event], None]) -> Fit:
    """Train in the configuration's directory, from its newest checkpoint if there is one."""
    trial_dir = config.output or Path()
    with open_run_dir(trial_dir, config, resume=True, command="run"), StopFlag() as stop:
        saved = _load(trial_dir)
        if saved is not None:
            return saved
        fit = _measure(train(config, fine_tuning(config), RunContext(trial_dir, stop, watch)))
        replace_file(trial_dir / TRIAL_FILE, (fit.model_dump_json(indent=1) + "\n").encode())
        return fit


def _read_fit(config: RunConfig) -> Fit | None:
    trial_dir = config.output or Path()
    if not (trial_dir / TRIAL_FILE).exists():
        return None
    with open_run_dir(trial_dir, config, resume=True, command="run"):  # refuses a trial of another configuration
        return _load(trial_dir)


FIT = Work(_fit, _read_fit)
"""A trial: the run without its test."""


def _load(trial_dir: Path) -> Fit | None:
    """Read `trial.json`; None if there is none or it is damaged: training from the last checkpoint rewrites it."""
    try:
        return Fit.build(updated_fit(json.loads((trial_dir / TRIAL_FILE).read_text(encoding="utf-8"))), TRIAL_FILE)
    except (OSError, ValueError, ConfigError):
        return None


def _measure(trained: Trained) -> Fit:
    ready = trained.ready
    fit = trained.fit
    counts = ready.attachment.counts
    if fit.val is None:
        raise UsageError(f"a sweep needs a validation split, which {ready.dataset.name} does not have")
    return Fit(
        task=ready.task.name,
        val_metrics=fit.val.report(trained.metric_info),
        metric_info=trained.metric_info,
        epoch=fit.epoch,
        lr=fit.lr,
        tuned=counts.tuned,
        head=counts.head,
        percent_of_backbone=counts.percent_of_backbone,
        images_per_s=fit.images_per_s,
        time_s=fit.time_s,
        backbone=ready.backbone.full_name,
        weights=ready.backbone.weights,
        provenance=provenance(ready.device) | {"precision": fit.precision},
    )
