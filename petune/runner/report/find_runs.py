"""Directories of runs, comparisons, sweeps and pretrainings below others, each with its state; none is dropped."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from petune.base.errors import CheckpointError, ConfigError, UsageError
from petune.base.yaml_values import read_yaml
from petune.runner.compare import Comparison
from petune.runner.result import RunResult
from petune.runner.run_dir import COMPARE_TABLE, CONFIG_FILE, RESULT_FILE, SWEEP_TABLE, TRIAL_FILE
from petune.runner.sweep.trials import Sweep
from petune.training.run_files import METRICS_FILE

Kind = Literal["run", "pretrain", "trial", "compare", "sweep"]
State = Literal["done", "unfinished", "broken"]
TABLES: dict[Kind, str] = {"compare": COMPARE_TABLE, "sweep": SWEEP_TABLE}
PARTS = {"adapter", "checkpoints", "tensorboard"}
"""Directories of a run that hold no runs."""


@dataclass(frozen=True)
class Found:
    """A directory that petune made.

    Attributes:
        path: Where.
        kind: Which command made it; a trial is a run of a sweep that was not tested.
        state: `broken` is one whose files cannot be read.
        detail: What is wrong or how far it is; empty for one that is done and whole.
        config: As in `config.yaml`; empty where there is none.
        result: Of a run or pretraining that is done.
        table: `compare.json` or `sweep.json`, of such a directory.
        epochs: The lines of `metrics.jsonl` that tell of an epoch.
    """

    path: Path
    kind: Kind
    state: State
    detail: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    result: RunResult | None = None
    table: dict[str, Any] | None = None
    epochs: tuple[dict[str, float], ...] = ()


def find(paths: Sequence[Path]) -> list[Found]:
    """Everything below `paths`, each once, in the order of the paths and then of the names.

    Raises:
        UsageError: A path is no directory, or nothing is there.
    """
    places: dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            raise UsageError(f"a report is made from directories, but {path} is none")
        for place in _places(path):
            places.setdefault(place.resolve(), place)
    if not places:
        shown = ", ".join(map(str, paths))
        raise UsageError(f"there must be runs to report on, but no directory below {shown} holds one")
    return [_read(place) for place in places.values()]


def _places(top: Path) -> Iterator[Path]:
    known = {CONFIG_FILE, RESULT_FILE, METRICS_FILE, *TABLES.values()}
    seen: set[Path] = set()
    for directory, below, files in os.walk(top, followlinks=True):
        place = Path(directory)
        here = place.resolve()
        ours = bool(known & set(files))
        parts = PARTS if ours else set()  # elsewhere a run may be called so
        below[:] = [] if here in seen else sorted(n for n in below if n not in parts and not n.startswith("."))
        if ours and here not in seen:
            yield place
        seen.add(here)


def _read(place: Path) -> Found:
    kind = _kind(place)
    if not (place / CONFIG_FILE).exists():
        config, problem = {}, ""
    else:
        try:
            config, problem = read_yaml(place / CONFIG_FILE), ""
        except ConfigError as error:
            config, problem = {}, str(error)
    if problem:
        return Found(place, kind, "broken", problem)
    return _read_table(place, kind, config) if kind in TABLES else _read_run(place, kind, config)


def _kind(place: Path) -> Kind:
    for kind, name in TABLES.items():
        if (place / name).exists():
            return kind
    try:
        with (place / CONFIG_FILE).open(encoding="utf-8", errors="replace") as file:
            words = file.readline(200).split()
    except OSError:
        return "run"
    if (place / TRIAL_FILE).exists() and not RunResult.exists(place):
        return "trial"
    others: tuple[Kind, ...] = ("pretrain", "compare", "sweep")
    return next((kind for kind in others if words[1:3] == ["petune", kind]), "run")


def _read_table(place: Path, kind: Kind, config: dict[str, Any]) -> Found:
    file = place / TABLES[kind]
    if not file.exists():
        return Found(place, kind, "unfinished", f"no {file.name} yet; started again it goes on", config)
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(table, dict):
            raise ValueError(f"it holds a {type(table).__name__}")
    except (OSError, ValueError) as error:
        return Found(place, kind, "broken", f"{file.name} cannot be read: {error}", config)
    try:
        whole = (Sweep if kind == "sweep" else Comparison).build(table, file.name)
    except ConfigError as error:
        return Found(place, kind, "broken", str(error), config)
    table = whole.model_dump(mode="json")
    if isinstance(whole, Sweep) and not whole.finished:
        far = f"{sum(row.state != 'running' for row in whole.rows)} trials done; started again it goes on"
        return Found(place, kind, "unfinished", far, config, table=table)
    return Found(place, kind, "done", "", config, table=table)


def _read_run(place: Path, kind: Kind, config: dict[str, Any]) -> Found:
    epochs, damaged = _epochs(place / METRICS_FILE)
    note = f"{damaged} damaged lines in {METRICS_FILE}" if damaged else ""
    if kind == "trial" and (place / TRIAL_FILE).exists():
        return Found(place, kind, "done", note, config, epochs=epochs)
    if not RunResult.exists(place):
        train = config.get("train")
        planned = train.get("epochs") if isinstance(train, dict) else None
        far = f"{len(epochs)} of {planned or '?'} epochs done"
        return Found(place, kind, "unfinished", "; ".join(filter(None, (far, note))), config, epochs=epochs)
    try:
        return Found(place, kind, "done", note, config, RunResult.read(place), epochs=epochs)
    except CheckpointError as error:
        return Found(place, kind, "broken", str(error), config, epochs=epochs)


def _epochs(file: Path) -> tuple[tuple[dict[str, float], ...], int]:
    """The epochs' lines, their finite numbers, and how many lines are no JSON objects."""
    rows, damaged = [], 0
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        try:
            values = dict(json.loads(line))
        except (ValueError, TypeError):
            damaged += 1
            continue
        if "train_loss" in values:
            rows.append({k: float(v) for k, v in values.items() if isinstance(v, int | float) and math.isfinite(v)})
    return tuple(row for row in rows if "epoch" in row), damaged
