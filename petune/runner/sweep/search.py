"""A search over a method's options and training options: chosen on val alone, the best one tested once."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from petune.backbones.create import check_weights
from petune.base.arguments import check_watch
from petune.base.errors import ConfigError, PetuneError, UsageError
from petune.base.files import replace_file
from petune.runner.events import RunStarted
from petune.runner.executors import Executor, Failure, Started, Work, choose_executor, serial
from petune.runner.file_names import CONFIG_FILE, SWEEP_TABLE, TRIAL_FILE
from petune.runner.migrations import read_config
from petune.runner.prepare import RunContext
from petune.runner.provenance import provenance
from petune.runner.result import RunResult
from petune.runner.run import fine_tuning, run, train
from petune.runner.run_config import RunConfig
from petune.runner.run_dir import open_run_dir
from petune.runner.run_inputs import check_inputs
from petune.runner.run_name import run_name
from petune.runner.stored_config import write_config
from petune.runner.sweep.space import is_whole, most, propose, require_sampler, within
from petune.runner.sweep.trials import (
    Fit,
    Sweep,
    SweepConfig,
    Trial,
    best_of,
    read_table,
    with_another_try,
    write_table,
    written,
)
from petune.training.events import Event, Note
from petune.training.stop import StopFlag

AT_ONCE = 4
"""How many sampled trials an executor gets at a time: each of them is chosen without the values of the others."""
Watch = Callable[[Event | RunStarted], None]


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
    config = SweepConfig.from_call(config, fields, "petune.sweep(...)")
    require_sampler(config.over, config.trials)
    check_weights(config.run.backbone, config.run.weights)
    chosen = choose_executor(executor)
    place = config.output or Path("runs") / sweep_name(config)
    with open_run_dir(place, _held(config, place), resume=True, command="sweep", tables=(SWEEP_TABLE,)):
        write_config(place, config.model_copy(update={"run": _without_place(config.run)}), "sweep")  # it may have grown
        check_inputs(place, config.run.dataset, config.run.weights)
        table = with_another_try(read_table(place, config, None if chosen is serial else AT_ONCE))
        with chosen if isinstance(chosen, AbstractContextManager) else nullcontext():
            while batch := _next(table, whole=chosen is not serial):
                table = _tried(table, batch, place, chosen, watch)
            test = table.best is not None and (config.test or RunResult.exists(_directory(place, table.best)))
            result = _tested(table, place, chosen, watch) if test else None
        return write_table(table.model_copy(update={"finished": True, "result": result}), place)


def sweep_name(config: SweepConfig) -> str:
    """The directory name of a sweep that names none."""
    return f"sweep-{run_name(config.run)}"


def _held(config: SweepConfig, place: Path) -> SweepConfig:
    """What guards the directory: all but how many trials, at once too, the test, and the space, which may grow."""
    held = config.model_copy(update={"run": _without_place(config.run)})
    file = place / CONFIG_FILE
    if not file.exists():
        return held
    before = SweepConfig.build(read_config(file), str(file))
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
    asked, refused = _built(config, batch, place)
    for row in refused:
        watch(Note(f"trial {row.trial} failed: {row.reason}"))
    rows = {row.trial: row for row in (*table.rows, *batch, *refused)}
    # the test that is there is of the best trial so far
    table = write_table(
        table.model_copy(update={"rows": tuple(rows.values()), "finished": False, "result": None}), place
    )
    total = max(most(config.over, config.trials), len(rows))

    def told(event: Event | Started) -> None:
        if not isinstance(event, Started):
            return watch(event)
        row, one = asked[event.index]
        words = ", ".join(f"{key}={written(value)}" for key, value in row.params.items())
        return watch(RunStarted(f"trial {row.trial}: {words}", one.seed, row.trial, total, False))

    for index, outcome in chosen([one for _, one in asked], lambda one: True, told, FIT) if asked else ():
        row, more = _ended(asked[index][0], outcome)
        if isinstance(outcome, Failure):
            watch(Note(f"trial {row.trial} failed: {outcome.reason}"))
        rows[row.trial] = row
        best = best_of(list(rows.values()))
        table = write_table(table.model_copy(update={"rows": tuple(rows.values()), "best": best, **more}), place)
        for done in rows.values():  # only the best one can still be tested
            if done.trial != best and done.state == "done":
                shutil.rmtree(_directory(place, done.trial) / "checkpoints", ignore_errors=True)
    lost = [row.trial for row in rows.values() if row.state == "running"]
    if lost:
        raise PetuneError(f"an executor must yield what became of every trial, but it did not of {lost}")
    return table


def _built(
    config: SweepConfig, batch: Sequence[Trial], place: Path
) -> tuple[list[tuple[Trial, RunConfig]], list[Trial]]:
    """Trials with their runs, and the rows of those that method or training refuse: corners of `over` fit together,
    what lies between them need not (`bottleneck=11` in two groups)."""
    asked, refused = [], []
    for row in batch:
        try:
            asked.append((row, _in(place, row.trial, config.trial(row.params))))
        except ConfigError as error:
            reason = f"ConfigError: {' '.join(str(error).split())}"
            refused.append(row.model_copy(update={"state": "failed", "reason": reason}))
    return asked, refused


def _ended(row: Trial, outcome: Fit | Failure) -> tuple[Trial, dict[str, Any]]:
    """The row with what became of its trial, and what is known of all trials by it."""
    if isinstance(outcome, Failure):
        return row.model_copy(update={"state": "failed", "reason": outcome.reason}), {}
    facts = outcome.model_dump()
    more = {key: facts.pop(key) for key in ("backbone", "weights", "provenance")}
    return row.model_copy(update={"state": "done", **facts}), more


def _tested(table: Sweep, place: Path, chosen: Executor, watch: Watch) -> RunResult:
    """The best trial as a run of its own, which goes on to its test where it was trained."""
    tested = RunResult.exists(_directory(place, table.best or 0))
    watch(Note(f"trial {table.best} is the best on val and {'was tested before' if tested else 'is tested'}"))
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
    with open_run_dir(place, config, resume=True, command="run"), StopFlag() as stop:
        saved = Fit.saved(place)
        if saved is not None:
            return saved
        done = train(config, fine_tuning(config), RunContext(place, stop, watch))
        ready, fitted, counts = done.ready, done.fit, done.ready.attachment.counts
        if fitted.val is None:
            raise UsageError(f"a sweep chooses on a validation split, but {ready.dataset.name} has none")
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
            backbone=ready.backbone.full_name,
            weights=ready.backbone.weights,
            provenance=provenance(ready.device) | {"precision": fitted.precision},
        )
        replace_file(place / TRIAL_FILE, (fit.model_dump_json(indent=1) + "\n").encode())
        return fit


def _fitted(config: RunConfig) -> Fit | None:
    place = config.output or Path()
    if not (place / TRIAL_FILE).exists():
        return None
    with open_run_dir(place, config, resume=True, command="run"):  # it must be of this configuration
        return Fit.saved(place)


FIT = Work(_fit, _fitted)


def _directory(place: Path, number: int) -> Path:
    return place / f"trial-{number:03d}"


def _in(place: Path, number: int, config: RunConfig) -> RunConfig:
    return config.model_copy(update={"output": _directory(place, number), "resume": True})
