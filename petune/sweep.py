"""A search over a method's options and training options: chosen on val alone, the best one tested once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from petune.arguments import check_watch
from petune.backbones import check_weights
from petune.began import hold_beginning
from petune.compare import RunStarted
from petune.config import Config, UserPath, override, read_yaml
from petune.errors import CheckpointError, ConfigError, DataError, HubError, PetuneError, UsageError, WeightsUnavailable
from petune.executors import Executor, Failure, Started, Work, choose_executor, serial
from petune.files import replace_file
from petune.measure import provenance
from petune.registry import build_tuner
from petune.results import RunResult
from petune.run import RunConfig, default_name, parse_method, run, trained, tuner_of
from petune.rundir import CONFIG_FILE, claimed
from petune.space import Params, Range, Value, corners, is_whole, most, propose, require_sampler, within
from petune.train import Event, Note, StopFlag

TRIAL_FILE, TABLE_FILE = "trial.json", "sweep.json"
TRAINING = "train."
COMMAND = "petune sweep --config config.yaml"
TRIAL_COMMAND = "petune run --config config.yaml"
AT_ONCE = 4
"""How many sampled trials an executor gets at a time: each of them is chosen without the values of the others."""
NOT_OF_THE_TRIAL = {error.__name__ for error in (DataError, WeightsUnavailable, HubError, CheckpointError)}
Watch = Callable[[Event | RunStarted], None]


class SweepConfig(Config):
    """What to search.

    Attributes:
        over: By key: values, or a Range (`low`, `high`, `log`). `train.lr` and the like are training options, every
            other key is an option of the method.
        trials: How many at most; a grid that has no more combinations is tried whole, in its order.
        test: Whether the best trial reads test when all are done; never before, and no other does.
        at_once: How many are sampled, and done, before the next are; a grid that is tried whole is not divided but
            by `serial`. None is what the sweep had before, else 1 with `serial` and 4 elsewhere.
        run: What all trials share: method, backbone, dataset, seed (also the sampler's) and the rest.
        output: The directory; None makes a name under `runs/`. Started again it goes on, with more trials or a wider
            `over` if these were changed.
    """

    over: dict[str, Range | tuple[Value, ...]] = Field(min_length=1)
    trials: int = Field(20, ge=1, le=10_000)
    test: bool = True
    at_once: int | None = Field(None, ge=1)
    run: RunConfig = RunConfig()
    output: UserPath | None = None

    @field_validator("over")
    @classmethod
    def _each_once(cls, value: dict[str, Range | tuple[Value, ...]]) -> dict[str, Range | tuple[Value, ...]]:
        for key, dimension in value.items():
            if not isinstance(dimension, Range) and (not dimension or len(set(dimension)) < len(dimension)):
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


class Fit(Config):
    """What training without a test tells of a trial; saved as `trial.json`."""

    val_top1: float
    val_top5: float
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

    @classmethod
    def saved(cls, directory: Path) -> Self | None:
        """What is there; None where nothing can be read, and training from its last checkpoint says it again."""
        try:
            return cls.build(json.loads((directory / TRIAL_FILE).read_text(encoding="utf-8")), TRIAL_FILE)
        except (OSError, ValueError, ConfigError):
            return None


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
    executor: str | Executor = "serial",
    watch: Watch = lambda event: None,
    **fields: Any,
) -> Sweep:
    """Try parameters, choose on val, test the best: `petune.sweep(over={"bottleneck": [8, 64]}, run={…})`.

    Args:
        executor: Where the trials and the test are done, as `ray:cpus=2`; see `petune.executors`.
        config: What to search; without it `fields` make one.
        watch: Told when a trial begins, and of every step, epoch and note.

    Raises:
        UsageError: The directory holds another sweep, or is in use.
        MissingExtra: optuna, or the executor's package, is needed and not installed.
        Stopped: A signal came; started again the sweep goes on.
    """
    check_watch("petune.sweep", watch)
    config = SweepConfig.given(config, fields, "petune.sweep(...)")
    require_sampler(config.over, config.trials)
    check_weights(config.run.backbone, config.run.weights)
    chosen = choose_executor(executor)
    place = config.output or Path("runs") / sweep_name(config)
    with claimed(place, _held(config, place), resume=True, command=COMMAND, tables=(TABLE_FILE,)):
        asked = config.model_copy(update={"run": _without_place(config.run), "output": None})
        replace_file(place / CONFIG_FILE, f"# {COMMAND}\n{asked.to_yaml()}".encode())  # it may have grown
        hold_beginning(place, config.run.dataset, config.run.weights)
        table = _again(_read(place, config, None if chosen is serial else AT_ONCE))
        with chosen if isinstance(chosen, AbstractContextManager) else nullcontext():
            while batch := _next(table, whole=chosen is not serial):
                table = _tried(table, batch, place, chosen, watch)
            test = table.best is not None and (config.test or RunResult.exists(_directory(place, table.best)))
            result = _tested(table, place, chosen, watch) if test else None
        return _write(table.model_copy(update={"finished": True, "result": result}), place)


def sweep_name(config: SweepConfig) -> str:
    """The directory name of a sweep that names none."""
    return f"sweep-{default_name(config.run)}"


def _held(config: SweepConfig, place: Path) -> SweepConfig:
    """What guards the directory: all but how many trials, at once too, the test, and the space, which may grow."""
    held = config.model_copy(update={"run": _without_place(config.run)})
    file = place / CONFIG_FILE
    if not file.exists():
        return held
    before = SweepConfig.build(read_yaml(file), str(file))
    over = before.over if within(before.over, config.over) else config.over
    grown = {"trials": before.trials, "test": before.test, "at_once": before.at_once, "over": over}
    return held.model_copy(update=grown)


def _without_place(run: RunConfig) -> RunConfig:
    return run.model_copy(update={"output": None, "resume": False})


def _next(table: Sweep, whole: bool) -> tuple[Trial, ...]:
    """The trials that were cut off, and with them new ones; none when there are enough.

    A trial's parameters depend on the values of the batches before it, on the parameters before it in its own, and on
    the seed; not on which trials of its batch are done, so a sweep that was cut off goes on as it would have.

    Args:
        table: So far.
        whole: Whether the rest of a grid is one batch.
    """
    config, rows = table.config, list(table.rows)
    batch = [row for row in rows if row.state == "running"]
    size = config.at_once or 1
    start = (batch[0].trial if batch else len(rows)) // size * size
    end = config.trials if whole and is_whole(config.over, config.trials) else min(start + size, config.trials)
    known = [(row.params, row.val_top1) for row in rows[:start]]
    while len(rows) < end:
        params = propose(config.over, known, config.trials, config.run.seed, [row.params for row in rows[start:]])
        if params is None:
            break
        rows.append(Trial(trial=len(rows), params=params, state="running"))
        batch.append(rows[-1])
    return tuple(batch)


def _tried(table: Sweep, batch: Sequence[Trial], place: Path, chosen: Executor, watch: Watch) -> Sweep:
    """The table with these trials done; a failure of one is a row."""
    config = table.config
    rows = {row.trial: row for row in (*table.rows, *batch)}
    # the test that is there is of the best trial so far
    table = _write(table.model_copy(update={"rows": tuple(rows.values()), "finished": False, "result": None}), place)
    total = max(most(config.over, config.trials), len(rows))
    configs = [_in(place, row.trial, config.trial(row.params)) for row in batch]

    def told(event: Event | Started) -> None:
        if not isinstance(event, Started):
            return watch(event)
        row, one = batch[event.index], configs[event.index]
        words = ", ".join(f"{key}={_written(value)}" for key, value in row.params.items())
        return watch(RunStarted(f"trial {row.trial}: {words}", one.seed, row.trial, total, False))

    for index, outcome in chosen(configs, lambda one: True, told, FIT):
        row, more = _ended(batch[index], outcome)
        if isinstance(outcome, Failure):
            watch(Note(f"trial {row.trial} failed: {outcome.reason}"))
        rows[row.trial] = row
        best = _best(list(rows.values()))
        table = _write(table.model_copy(update={"rows": tuple(rows.values()), "best": best, **more}), place)
        for done in rows.values():  # only the best one can still be tested
            if done.trial != best and done.state == "done":
                shutil.rmtree(_directory(place, done.trial) / "checkpoints", ignore_errors=True)
    lost = [row.trial for row in rows.values() if row.state == "running"]
    if lost:
        raise PetuneError(f"an executor must yield what became of every trial, but it did not of {lost}")
    return table


def _ended(row: Trial, outcome: Fit | Failure) -> tuple[Trial, dict[str, Any]]:
    """The row with what became of its trial, and what is known of all trials by it."""
    if isinstance(outcome, Failure):
        return row.model_copy(update={"state": "failed", "reason": outcome.reason}), {}
    facts = outcome.model_dump()
    more = {key: facts.pop(key) for key in ("backbone", "weights", "provenance")}
    return row.model_copy(update={"state": "done", **facts}), more


def _tested(table: Sweep, place: Path, chosen: Executor, watch: Watch) -> RunResult:
    """The best trial as a run of its own, which goes on to its test where it was trained."""
    watch(Note(f"trial {table.best} is the best on val and is tested"))
    best = _in(place, table.best or 0, table.config.trial(table.params))
    if chosen is serial:
        return run(best, watch=watch)  # its error is the sweep's

    def told(event: Event | Started) -> None:
        if not isinstance(event, Started):
            watch(event)

    for _, outcome in chosen([best], lambda one: True, told):
        if isinstance(outcome, RunResult):
            return outcome
        raise PetuneError(f"trial {table.best} is the best on val, but its test failed: {outcome.reason}")
    raise PetuneError(f"an executor must yield what became of the test of trial {table.best}, but yielded nothing")


def _fit(config: RunConfig, watch: Callable[[Event], None]) -> Fit:
    """Train without reading test; the work of a trial."""
    place = config.output or Path()
    with claimed(place, config, resume=True, command=TRIAL_COMMAND), StopFlag() as stop:
        saved = Fit.saved(place)
        if saved is not None:
            return saved
        done = trained(config, tuner_of(config), place, stop, watch)
        fitted, counts = done.fitted, done.attachment.counts
        if fitted.val is None:
            raise UsageError(f"a sweep chooses on a validation split, but {done.dataset.name} has none")
        fit = Fit(
            val_top1=fitted.val.top1,
            val_top5=fitted.val.top5,
            epoch=fitted.epoch,
            lr=fitted.lr,
            tuned=counts.tuned,
            head=counts.head,
            percent_of_backbone=counts.percent_of_backbone,
            images_per_s=fitted.images_per_s,
            time_s=fitted.time_s,
            backbone=done.backbone.full_name,
            weights=done.backbone.weights,
            provenance=provenance(done.trainer.device) | {"precision": fitted.precision},
        )
        replace_file(place / TRIAL_FILE, (fit.model_dump_json(indent=1) + "\n").encode())
        return fit


def _fitted(config: RunConfig) -> Fit | None:
    place = config.output or Path()
    if not (place / TRIAL_FILE).exists():
        return None
    with claimed(place, config, resume=True, command=TRIAL_COMMAND):  # it must be of this configuration
        return Fit.saved(place)


FIT = Work(_fit, _fitted)


def _best(rows: Sequence[Trial]) -> int | None:
    done = [row for row in rows if row.val_top1 is not None]
    return max(done, key=lambda row: (row.val_top1 or 0.0, -row.trial)).trial if done else None


def _directory(place: Path, number: int) -> Path:
    return place / f"trial-{number:03d}"


def _in(place: Path, number: int, config: RunConfig) -> RunConfig:
    return config.model_copy(update={"output": _directory(place, number), "resume": True})


def _read(place: Path, config: SweepConfig, at_once: int | None) -> Sweep:
    """The table so far, for `config`, which may want more trials; `at_once` where neither says it."""
    file = place / TABLE_FILE
    if not file.exists():
        own = config.model_copy(update={"at_once": config.at_once or at_once})
        return Sweep(config=own, output=str(place))
    try:
        table = Sweep.build(json.loads(file.read_text(encoding="utf-8")), TABLE_FILE)
    except (OSError, ValueError, ConfigError) as error:
        raise CheckpointError(f"{file} must hold the trials of this sweep, but cannot be used: {error}") from None
    own = config.model_copy(update={"at_once": config.at_once or table.config.at_once or at_once})
    return table.model_copy(update={"config": own, "output": str(place)})


def _again(table: Sweep) -> Sweep:
    """With what failed for data, weights or disk to be tried again: that is not the trial's fault."""
    rows = [
        row.model_copy(update={"state": "running", "reason": ""})
        if row.state == "failed" and row.reason.partition(":")[0] in NOT_OF_THE_TRIAL
        else row
        for row in table.rows
    ]
    return table.model_copy(update={"rows": tuple(rows)})


def _write(table: Sweep, place: Path) -> Sweep:
    replace_file(place / TABLE_FILE, (table.model_dump_json(indent=1) + "\n").encode())
    return table


def _written(value: Value | None) -> str:
    """The value as `parse_value` reads it back."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
