"""A search over a method's options and training options: chosen on val alone, the best one tested once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from petune.backbones import check_weights
from petune.compare import RunStarted
from petune.config import Config, override, read_yaml
from petune.errors import CheckpointError, ConfigError, PetuneError, Stopped, UsageError
from petune.files import replace_file
from petune.measure import provenance
from petune.registry import build_tuner
from petune.results import RunResult
from petune.run import RunConfig, default_name, parse_method, run, trained, tuner_of
from petune.rundir import CONFIG_FILE, claimed
from petune.space import Params, Range, Value, corners, propose, require_sampler, within
from petune.train import Event, Note, StopFlag

TRIAL_FILE, TABLE_FILE = "trial.json", "sweep.json"
TRAINING = "train."


class SweepConfig(Config):
    """What to search.

    Attributes:
        over: By key: values, or a Range (`low`, `high`, `log`). `train.lr` and the like are training options, every
            other key is an option of the method.
        trials: How many at most; a grid that has no more combinations is tried whole, in its order.
        test: Whether the best trial reads test when all are done; never before, and no other does.
        run: What all trials share: method, backbone, dataset, seed (also the sampler's) and the rest.
        output: The directory; None makes a name under `runs/`. Started again it goes on, with more trials or a wider
            `over` if these were changed.
    """

    over: dict[str, Range | tuple[Value, ...]] = Field(min_length=1)
    trials: int = Field(20, ge=1, le=10_000)
    test: bool = True
    run: RunConfig = RunConfig()
    output: Path | None = None

    @field_validator("over")
    @classmethod
    def _each_once(cls, value: dict[str, Range | tuple[Value, ...]]) -> dict[str, Range | tuple[Value, ...]]:
        for key, dimension in value.items():
            if not isinstance(dimension, Range) and (not dimension or len(set(map(repr, dimension))) < len(dimension)):
                raise ValueError(f"{key} must have values, each once, but has {list(dimension)}")
        return value

    @model_validator(mode="after")
    def _trials_can_be_built(self) -> Self:
        for params in corners(self.over):
            self.trial(params)
        return self

    def trial(self, params: Params) -> RunConfig:
        """The run with these parameters.

        Raises:
            ConfigError: Method or training do not take them.
        """
        name, options = parse_method(self.run.method)
        options |= {key: value for key, value in params.items() if not key.startswith(TRAINING)}
        try:
            build_tuner(name, **options)
        except PetuneError as error:
            raise ValueError(str(error)) from None
        text = ",".join(f"{key}={_written(value)}" for key, value in options.items())
        values = override(
            self.run.model_dump(), [f"{key}={_written(v)}" for key, v in params.items() if key.startswith(TRAINING)]
        )
        try:
            return RunConfig.build(values | {"method": f"{name}:{text}" if text else name}, "a trial")
        except ConfigError as error:
            raise ValueError(str(error)) from None


class Trial(Config):
    """One trial. One that failed has a reason and no numbers; what stopped while `running` goes on first."""

    trial: int
    params: dict[str, Any]
    state: Literal["running", "done", "failed"]
    reason: str = ""
    val_top1: float | None = None
    val_top5: float | None = None
    epoch: int | None = None
    lr: float | None = None
    tuned: int | None = None
    head: int | None = None
    percent_of_backbone: float | None = None
    images_per_s: float | None = None
    time_s: float | None = None


class Sweep(Config):
    """What a sweep yields; saved as `sweep.json`, from the first trial on.

    Attributes:
        rows: The trials in their order.
        best: The number of the one with the highest top-1 on val; of equals the first.
        result: Of the best one, with its test; None until all are done, or without a test.
        finished: Whether all is done.
    """

    config: SweepConfig
    rows: tuple[Trial, ...] = ()
    best: int | None = None
    result: RunResult | None = None
    finished: bool = False
    backbone: str = ""
    weights: str = ""
    provenance: dict[str, Any] = {}
    output: str

    @property
    def params(self) -> Params:
        """The best trial's; empty where none is done."""
        return {} if self.best is None else dict(self.rows[self.best].params)


def sweep(
    config: SweepConfig | None = None,
    *,
    watch: Callable[[Event | RunStarted], None] = lambda event: None,
    **fields: Any,
) -> Sweep:
    """Try parameters, choose on val, test the best: `petune.sweep(over={"bottleneck": [8, 64]}, run={…})`.

    Args:
        config: What to search; without it `fields` make one.
        watch: Told when a trial begins, and of every step, epoch and note.

    Raises:
        UsageError: The directory holds another sweep, or is in use.
        MissingExtra: optuna is needed and not installed.
        Stopped: A signal came; started again the sweep goes on.
    """
    config = config or SweepConfig.build(fields, "petune.sweep(...)")
    require_sampler(config.over, config.trials)
    check_weights(config.run.backbone, config.run.weights)
    place = config.output or Path("runs") / sweep_name(config)
    with claimed(place, _held(config, place), resume=True, command="petune sweep --config config.yaml"):
        table = _read(place, config)
        while (params := _next(table)) is not None:
            table = _tried(table, params, place, watch)
        result = None
        if config.test and table.best is not None:
            watch(Note(f"trial {table.best} is the best on val and is tested"))
            best = _in(place, table.best, config.trial(table.params))
            result = run(best, watch=watch)
        return _write(table.model_copy(update={"finished": True, "result": result}), place)


def sweep_name(config: SweepConfig) -> str:
    """The directory name of a sweep that names none."""
    return f"sweep-{default_name(config.run)}"


def _held(config: SweepConfig, place: Path) -> SweepConfig:
    """What guards the directory: all but the number of trials and the space, which may grow."""
    held = config.model_copy(update={"run": config.run.model_copy(update={"output": None, "resume": False})})
    file = place / CONFIG_FILE
    if not file.exists():
        return held
    before = SweepConfig.build(read_yaml(file), str(file))
    over = before.over if within(before.over, config.over) else config.over
    return held.model_copy(update={"trials": before.trials, "over": over})


def _next(table: Sweep) -> Params | None:
    """The parameters of the trial that was cut off, else new ones; None when there are enough."""
    running = [row.params for row in table.rows if row.state == "running"]
    if running:
        return running[0]
    if len(table.rows) >= table.config.trials:
        return None
    tried = [(row.params, row.val_top1) for row in table.rows]
    return propose(table.config.over, tried, table.config.trials, table.config.run.seed)


def _tried(table: Sweep, params: Params, place: Path, watch: Callable[[Event | RunStarted], None]) -> Sweep:
    """The table with this trial done; a failure of its own is a row."""
    config, before = table.config, tuple(row for row in table.rows if row.state != "running")
    number = len(before)
    begun = Trial(trial=number, params=params, state="running")
    table = _write(table.model_copy(update={"rows": (*before, begun), "finished": False}), place)
    one = _in(place, number, config.trial(params))
    total = max(config.trials, number + 1)
    words = ", ".join(f"{key}={_written(value)}" for key, value in params.items())
    watch(RunStarted(f"trial {number}: {words}", one.seed, number, total, False))
    try:
        row, more = _fit(one, begun, watch)
    except (Stopped, UsageError):
        raise
    except PetuneError as error:
        watch(Note(f"trial {number} failed: {error}"))
        reason = f"{type(error).__name__}: {error}"
        row, more = begun.model_copy(update={"state": "failed", "reason": reason}), {}
    rows = (*before, row)
    best = _best(rows)
    table = _write(table.model_copy(update={"rows": rows, "best": best, **more}), place)
    for done in rows:  # only the best one can still be tested
        if done.trial != best and done.state == "done":
            shutil.rmtree(_directory(place, done.trial) / "checkpoints", ignore_errors=True)
    return table


def _fit(config: RunConfig, row: Trial, watch: Callable[[Event], None]) -> tuple[Trial, dict[str, Any]]:
    """Train without reading test; the row, and what is known of all trials by it."""
    place = config.output or Path()
    with claimed(place, config, resume=True, command="petune run --config config.yaml"), StopFlag() as stop:
        done = trained(config, tuner_of(config), place, stop, watch)
        fitted, counts = done.fitted, done.attachment.counts
        if fitted.val is None:
            raise UsageError(f"a sweep chooses on a validation split, but {done.dataset.name} has none")
        row = row.model_copy(
            update={
                "state": "done",
                "val_top1": fitted.val.top1,
                "val_top5": fitted.val.top5,
                "epoch": fitted.epoch,
                "lr": fitted.lr,
                "tuned": counts.tuned,
                "head": counts.head,
                "percent_of_backbone": counts.percent_of_backbone,
                "images_per_s": fitted.images_per_s,
                "time_s": fitted.time_s,
            }
        )
        replace_file(place / TRIAL_FILE, (row.model_dump_json(indent=1) + "\n").encode())
        where = provenance(done.trainer.device) | {"precision": fitted.precision}
        return row, {"backbone": done.backbone.full_name, "weights": done.backbone.weights, "provenance": where}


def _best(rows: Sequence[Trial]) -> int | None:
    done = [row for row in rows if row.val_top1 is not None]
    return max(done, key=lambda row: (row.val_top1 or 0.0, -row.trial)).trial if done else None


def _directory(place: Path, number: int) -> Path:
    return place / f"trial-{number:03d}"


def _in(place: Path, number: int, config: RunConfig) -> RunConfig:
    return config.model_copy(update={"output": _directory(place, number), "resume": True})


def _read(place: Path, config: SweepConfig) -> Sweep:
    """The table so far, for `config`, which may want more trials."""
    file = place / TABLE_FILE
    if not file.exists():
        return Sweep(config=config, output=str(place))
    try:
        table = Sweep.build(json.loads(file.read_text(encoding="utf-8")), TABLE_FILE)
    except (OSError, ValueError, ConfigError) as error:
        raise CheckpointError(f"{file} must hold the trials of this sweep, but cannot be used: {error}") from None
    return table.model_copy(update={"config": config, "output": str(place)})


def _write(table: Sweep, place: Path) -> Sweep:
    replace_file(place / TABLE_FILE, (table.model_dump_json(indent=1) + "\n").encode())
    return table


def _written(value: Value) -> str:
    """The value as `parse_value` reads it back."""
    return str(value).lower() if isinstance(value, bool) else str(value)
