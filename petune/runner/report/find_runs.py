"""Find the directories of runs, comparisons, sweeps and pretrainings, each with its state; none is left out."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from petune.base.errors import CheckpointError, ConfigError, UsageError
from petune.base.text import plural
from petune.runner.comparison import Comparison
from petune.runner.cross_validate import CrossValidation
from petune.runner.directory_kind import TABLES, Kind, kind_of
from petune.runner.file_names import (
    CONFIG_FILE,
    FINAL_FIT_DIR,
    FOLDS_TABLE,
    GRID_TABLE,
    RESULT_FILE,
    SWEEP_TABLE,
    TRIAL_FILE,
)
from petune.runner.grid import Grid
from petune.runner.migrations import read_config, updated_sweep
from petune.runner.result import RunResult
from petune.runner.sweep.trials import Sweep
from petune.training.run_files import METRICS_FILE

State = Literal["done", "unfinished", "broken"]
NO_RUNS_INSIDE = {"adapter", "checkpoints", FINAL_FIT_DIR, "tensorboard"}
"""Directories of a run that hold no runs."""
RESUME = "run the same command to resume"


@dataclass(frozen=True)
class RunDirectory:
    """A directory that petune made.

    Attributes:
        path: The directory.
        kind: Which command made it; a trial is a run of a sweep that was not tested. A grid holds comparisons, and a
            cross-validation its runs.
        state: `broken` if files cannot be read.
        detail: What is wrong, or how far it is; empty if it is done and complete.
        config: As in `config.yaml`; empty if there is none.
        result: Of a finished run or pretraining.
        comparison, sweep, grid, folds: The table of such a directory.
        epochs: The lines of `metrics.jsonl` that end an epoch.
    """

    path: Path
    kind: Kind | Literal["grid", "folds"]
    state: State
    detail: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    result: RunResult | None = None
    comparison: Comparison | None = None
    sweep: Sweep | None = None
    grid: Grid | None = None
    folds: CrossValidation | None = None
    epochs: tuple[dict[str, float], ...] = ()


def find_runs(paths: Sequence[Path]) -> list[RunDirectory]:
    """Read every directory of petune below `paths`, each once, in the order of the paths and then of the names.

    Raises:
        UsageError: A path is no directory, or nothing was found.
    """
    directories: dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            raise UsageError(f"{path} is not a directory. A report is made from directories of runs")
        for directory in _walk(path):
            directories.setdefault(directory.resolve(), directory)
    if not directories:
        raise UsageError(f"no runs found below {', '.join(map(str, paths))}")
    return [read_directory(directory) for directory in directories.values()]


def _walk(top: Path) -> Iterator[Path]:
    files_of_petune = {CONFIG_FILE, RESULT_FILE, METRICS_FILE, GRID_TABLE, FOLDS_TABLE, *TABLES.values()}
    seen: set[Path] = set()
    for name, below, files in os.walk(top, followlinks=True):
        directory = Path(name)
        resolved = directory.resolve()
        made_by_petune = bool(files_of_petune & set(files))
        skipped = NO_RUNS_INSIDE if made_by_petune else set()  # elsewhere a run may have such a name
        below[:] = [] if resolved in seen else sorted(n for n in below if n not in skipped and not n.startswith("."))
        if made_by_petune and resolved not in seen:
            yield directory
        seen.add(resolved)


def read_directory(path: Path) -> RunDirectory:
    """Read a directory that petune made; what is damaged is in `detail`."""
    if (path / GRID_TABLE).exists() or (path / FOLDS_TABLE).exists():
        return _read_table(path)
    kind = kind_of(path)
    config: dict[str, Any] = {}
    if (path / CONFIG_FILE).exists():
        try:
            config = read_config(path / CONFIG_FILE)
        except ConfigError as error:
            return RunDirectory(path, kind, "broken", str(error))
    if kind == "compare":
        return _read_comparison(path, config)
    if kind == "sweep":
        return _read_sweep(path, config)
    return _read_run(path, kind, config)


def _read_table(path: Path) -> RunDirectory:
    """Read the table of a grid or of a cross-validation."""
    kind: Literal["grid", "folds"] = "grid" if (path / GRID_TABLE).exists() else "folds"
    try:
        if kind == "grid":
            return RunDirectory(path, kind, "done", grid=Grid.read(path))
        return RunDirectory(path, kind, "done", folds=CrossValidation.read(path))
    except CheckpointError as error:
        return RunDirectory(path, kind, "broken", str(error))


def _read_comparison(path: Path, config: dict[str, Any]) -> RunDirectory:
    if not (path / TABLES["compare"]).exists():
        return RunDirectory(path, "compare", "unfinished", f"no {TABLES['compare']} yet; {RESUME}", config)
    try:
        return RunDirectory(path, "compare", "done", "", config, comparison=Comparison.read(path))
    except CheckpointError as error:
        return RunDirectory(path, "compare", "broken", str(error), config)


def _read_sweep(path: Path, config: dict[str, Any]) -> RunDirectory:
    file = path / SWEEP_TABLE
    if not file.exists():
        return RunDirectory(path, "sweep", "unfinished", f"no {SWEEP_TABLE} yet; {RESUME}", config)
    try:
        sweep = Sweep.build(updated_sweep(json.loads(file.read_text(encoding="utf-8"))), SWEEP_TABLE)
    except (OSError, ValueError, ConfigError) as error:
        return RunDirectory(path, "sweep", "broken", f"{SWEEP_TABLE} cannot be read: {error}", config)
    if sweep.finished:
        return RunDirectory(path, "sweep", "done", "", config, sweep=sweep)
    done = sum(trial.state != "running" for trial in sweep.rows)
    return RunDirectory(path, "sweep", "unfinished", f"{plural(done, 'trial')} done; {RESUME}", config, sweep=sweep)


def _read_run(path: Path, kind: Kind, config: dict[str, Any]) -> RunDirectory:
    epochs, damaged = _read_epochs(path / METRICS_FILE)
    warning = f"{plural(damaged, 'damaged line')} in {METRICS_FILE}" if damaged else ""
    if kind == "trial" and (path / TRIAL_FILE).exists():
        return RunDirectory(path, kind, "done", warning, config, epochs=epochs)
    if not RunResult.exists(path):
        train = config.get("train")
        planned = train.get("epochs") if isinstance(train, dict) else None
        progress = f"epochs done: {len(epochs)} of {planned or '?'}"
        detail = f"{progress}; {warning}" if warning else progress
        return RunDirectory(path, kind, "unfinished", detail, config, epochs=epochs)
    try:
        result = RunResult.read(path)
        undefined = "" if result.metrics else "no metric is defined on test"
        return RunDirectory(
            path, kind, "done", "; ".join(filter(None, (undefined, warning))), config, result, epochs=epochs
        )
    except CheckpointError as error:
        return RunDirectory(path, kind, "broken", str(error), config, epochs=epochs)


def _read_epochs(file: Path) -> tuple[tuple[dict[str, float], ...], int]:
    """Return the finite numbers of each epoch's line, and how many lines are not JSON objects."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return (), 0
    epochs = []
    damaged = 0
    for line in lines:
        try:
            values = dict(json.loads(line))
        except (ValueError, TypeError):
            damaged += 1
            continue
        numbers = {k: float(v) for k, v in values.items() if isinstance(v, int | float) and math.isfinite(v)}
        if "train_loss" in values and "epoch" in numbers:
            epochs.append(numbers)
    return tuple(epochs), damaged
