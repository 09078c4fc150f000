"""Search options of a method and of its training: trials are compared on val, and the best one is tested once."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from petune.backbones.create import check_weights
from petune.backbones.quantize import check_base_precision
from petune.base.arguments import check_watch
from petune.base.errors import ConfigError, PetuneError, UsageError
from petune.base.files import replace_file
from petune.runner.events import RunEvent, RunStarted, WatchRuns
from petune.runner.executors import Executor, Failure, FromRun, Started, choose_executor, serial
from petune.runner.file_names import SWEEP_TABLE
from petune.runner.result import RunResult
from petune.runner.run import run
from petune.runner.run_config import RunConfig
from petune.runner.run_dir import check_run_dir, open_run_dir
from petune.runner.run_inputs import RunInputs, check_inputs, check_pixels_of_runs
from petune.runner.run_name import run_name
from petune.runner.stored_config import write_config
from petune.runner.sweep.fit import FIT, Fit
from petune.runner.sweep.proposals import is_full_grid, num_trials, propose, require_sampler
from petune.runner.sweep.space import contains, corners
from petune.runner.sweep.sweep_config import SweepConfig, to_text
from petune.runner.sweep.trials import Sweep, Trial, read_sweep
from petune.training.events import Event, Note
from petune.training.stop import StopFlag
from petune.training.task_registry import check_task

PARALLEL_TRIALS = 4
"""Default of `parallel_trials` for executors other than `serial`."""
MAY_CHANGE = ("search", "trials", "test", "parallel_trials")
"""Keys of the configuration that may change when a sweep is resumed."""


def sweep(
    config: SweepConfig | None = None,
    *,
    executor: str | Executor = "serial",
    watch: WatchRuns = lambda event: None,
    **fields: Any,
) -> Sweep:
    """Try parameters, choose on val, test the best: `petune.sweep(search={"bottleneck": [8, 64]}, run={…})`.

    Args:
        config: What to search; without it, `fields` are those of a SweepConfig.
        executor: What does the trials and the test, as `ray:cpus=2`; see `petune.runner.executors`.
        watch: Called when a trial starts, and with every step, epoch and note.

    Raises:
        UsageError: The directory holds another sweep, or is in use.
        MissingExtra: optuna or the executor's package is needed and not installed.
        Stopped: A signal arrived; call again to resume.
    """
    check_watch("petune.sweep", watch)
    config = SweepConfig.from_call(config, fields, "petune.sweep(...)").completed()
    check_sweep(config)
    check_base_precision(config.run.base_precision)
    check_weights(config.run.backbone, config.run.weights)
    chosen = choose_executor(executor)
    sweep_dir, asked = _directory(config), _to_store(config)
    with open_run_dir(sweep_dir, asked, resume=True, command="sweep", may_change=MAY_CHANGE, tables=(SWEEP_TABLE,)):
        search = _Search(sweep_dir, config, chosen, watch)
        write_config(sweep_dir, asked, "sweep")
        check_inputs(sweep_dir, RunInputs(config.run.dataset, config.run.weights, config.run.data_dir))
        search.check_pixels()
        with chosen if isinstance(chosen, AbstractContextManager) else nullcontext():
            return search.run()


def check_sweep(config: SweepConfig) -> None:
    """Check what `sweep` would refuse because of its directory, its sampler and its task, and write nothing.

    Raises:
        UsageError, MissingExtra: See `sweep`.
        UnknownName, ConfigError: See `check_task`.
    """
    config.run.check_one_fold()
    for params in corners(config.search):
        config.trial(params).check_final_fit()
    check_task(config.run.task, config.run.train.choose)
    require_sampler(config.search, config.trials)
    check_run_dir(_directory(config), _to_store(config), resume=True, command="sweep", may_change=MAY_CHANGE)


def _directory(config: SweepConfig) -> Path:
    return config.output or Path("runs") / sweep_name(config)


def _to_store(config: SweepConfig) -> SweepConfig:
    """Return the configuration without what belongs to one call."""
    return config.model_copy(update={"run": config.run.model_copy(update={"output": None, "resume": False})})


def sweep_name(config: SweepConfig) -> str:
    """Return the name of the directory, if the configuration has none."""
    return f"sweep-{run_name(config.run)}"


class _Search:
    """A sweep in progress. `table` is saved after every change, and is all that resuming needs.

    Raises:
        UsageError: The search does not contain a trial of the table.
        CheckpointError: The table is damaged.
    """

    def __init__(self, sweep_dir: Path, config: SweepConfig, executor: Executor, watch: WatchRuns) -> None:
        self.sweep_dir = sweep_dir
        self.executor = executor
        self.watch = watch
        self.table = read_sweep(sweep_dir) or Sweep(config=config, output=str(sweep_dir))
        parallel = config.parallel_trials or self.table.config.parallel_trials
        if parallel is None and executor is not serial:
            parallel = PARALLEL_TRIALS
        self.config = config.model_copy(update={"parallel_trials": parallel})
        for row in self.table.rows:
            if not contains(config.search, row.params):
                raise UsageError(
                    f"trial {row.trial} in {sweep_dir} ({_describe(row)}) is outside the search. Search at least what "
                    "was tried, or use another output",
                    cli_hint="Name a new directory with --output",
                )

    def check_pixels(self) -> None:
        """Check that new trials see the pixels of the finished ones.

        Raises:
            CheckpointError: See `check_pixels_of_runs`.
        """
        rows, total = self.table.rows, num_trials(self.config.search, self.config.trials)
        if self.table.finished and len(rows) >= total and not any(row.is_retryable for row in rows):
            return
        outputs = [self._trial_dir(number) for number in range(len(rows) + 1)]
        check_pixels_of_runs([self.config.run.model_copy(update={"output": output}) for output in outputs])

    def run(self) -> Sweep:
        """Do what is left: interrupted trials, new trials, the test."""
        retried = [_try_again(row) if row.is_retryable else row for row in self.table.rows]
        self.table = self.table.model_copy(update={"config": self.config, "output": str(self.sweep_dir)})
        self.table = self.table.model_copy(update={"rows": tuple(retried)})
        with StopFlag() as stop:
            while batch := self._next_batch():
                stop.check()
                self._try(batch)
            stop.check()
            best = self.table.best
            has_test = best is not None and (self.config.test or RunResult.exists(self._test_dir(best)))
            self._save(finished=True, result=self._test(best) if best is not None and has_test else None)
        if best is None:
            self.watch(Note(self.table.why_no_best()))
        return self.table

    def _next_batch(self) -> list[Trial]:
        """Return the interrupted trials, together with the new ones of their batch; empty at the end.

        New parameters depend on the values of earlier batches, the parameters of their own batch, and the seed, but not
        on which trials of the batch are done. So an interrupted sweep ends with the table of an uninterrupted one.
        """
        rows, config = list(self.table.rows), self.config
        running = [row.trial for row in rows if row.state == "running"]
        size = config.parallel_trials or 1
        start = (running[0] if running else len(rows)) // size * size
        whole = self.executor is not serial and is_full_grid(config.search, config.trials)
        end = config.trials if whole else min(start + size, config.trials)
        known = [(row.params, self.table.score(row)) for row in rows[:start]]
        while len(rows) < end:
            pending = [row.params for row in rows[start:]]
            params = propose(config.search, known, config.trials, config.run.seed, pending)
            if params is None:
                break
            rows.append(Trial(trial=len(rows), params=params, state="running"))
        return [row for row in rows if row.state == "running"]

    def _try(self, batch: Sequence[Trial]) -> None:
        """Do the trials and save the table after each of them; one that fails is a row with the reason."""
        self._save(*batch, finished=False, result=None)  # a result is that of the best trial before this batch
        configs: dict[int, RunConfig] = {}
        for row in batch:
            try:
                configs[row.trial] = self._trial_config(row)
            except ConfigError as error:  # corners of the search fit together, points between them may not
                self._record(row, Failure("ConfigError", " ".join(str(error).split())))
        rows = [self.table.rows[number] for number in configs]
        total = max(num_trials(self.config.search, self.config.trials), len(self.table.rows))

        def started(index: int) -> RunStarted:
            row = rows[index]
            return RunStarted(
                f"trial {row.trial}: {_describe(row)}", self.config.run.seed, row.trial, total, done=False
            )

        def report(event: Event | Started | FromRun) -> None:
            if isinstance(event, Started):
                self.watch(started(event.index))
            else:
                self.watch(RunEvent(started(event.index), event.event) if isinstance(event, FromRun) else event)

        if configs:
            for index, outcome in self.executor(list(configs.values()), lambda config: True, report, FIT):
                self._record(rows[index], outcome)
        lost = [row.trial for row in self.table.rows if row.state == "running"]
        if lost:
            raise PetuneError(f"the executor returned no result for the trials {lost}")

    def _record(self, row: Trial, outcome: Fit | Failure) -> None:
        """Save what became of a trial, and remove checkpoints of trials that can no longer be the best."""
        if isinstance(outcome, Failure):
            self.watch(Note(f"trial {row.trial} failed: {outcome.reason}"))
            failed = {"state": "failed", "reason": outcome.reason, "is_retryable": outcome.is_retryable}
            self._save(row.model_copy(update=failed))
        else:
            facts = dict(outcome)
            of_all = {key: facts.pop(key) for key in ("task", "metric_info", "backbone", "weights", "provenance")}
            self._save(row.model_copy(update={"state": "done", **facts}), **of_all)
        for other in self.table.rows:
            if other.state == "done" and other.trial != self.table.best:
                shutil.rmtree(self._trial_dir(other.trial) / "checkpoints", ignore_errors=True)

    def _test(self, best: int) -> RunResult:
        """Test the best trial: its run continues where its training ended, or trains on train and val."""
        was_tested = RunResult.exists(self._test_dir(best))
        self.watch(Note(f"trial {best} is the best on val and {'was tested before' if was_tested else 'is tested'}"))
        config = self._test_config(self.table.rows[best])
        if self.executor is serial:
            return run(config, watch=self.watch)

        def report(event: Event | Started | FromRun) -> None:
            if not isinstance(event, Started):
                self.watch(event.event if isinstance(event, FromRun) else event)

        outcomes = [outcome for _, outcome in self.executor([config], lambda config: True, report)]
        if not outcomes:
            raise PetuneError(f"the executor returned no result for the test of trial {best}")
        if isinstance(outcomes[0], Failure):
            raise PetuneError(f"the test of trial {best}, the best on val, failed: {outcomes[0].reason}")
        result: RunResult = outcomes[0]
        return result

    def _save(self, *rows: Trial, **changes: Any) -> None:
        """Replace or append rows, update the best trial and other fields, and write `sweep.json`."""
        by_number = {row.trial: row for row in (*self.table.rows, *rows)}
        changes |= {"rows": tuple(by_number.values())}
        self.table = self.table.model_copy(update=changes)
        self.table = self.table.model_copy(update={"best": self.table.best_trial()})
        content = self.table.model_dump_json(indent=1) + "\n"
        replace_file(self.sweep_dir / SWEEP_TABLE, content.encode())

    def _trial_config(self, row: Trial) -> RunConfig:
        config = self.config.trial(row.params)
        if config.final_fit == "only":  # val compares the trials by their last epoch, which the test is of, too
            train = config.train.model_copy(update={"val_every": config.train.epochs})
            config = config.model_copy(update={"final_fit": "none", "train": train})
        return config.model_copy(update={"output": self._trial_dir(row.trial), "resume": True})

    def _test_config(self, row: Trial) -> RunConfig:
        config = self.config.trial(row.params)
        return config.model_copy(update={"output": self._test_dir(row.trial), "resume": True})

    def _trial_dir(self, number: int) -> Path:
        return self.sweep_dir / f"trial-{number:03d}"

    def _test_dir(self, number: int) -> Path:
        """Return the directory of a trial's test: its own, unless the test trains on train and val from the start."""
        trial_dir = self._trial_dir(number)
        return trial_dir.with_name(f"{trial_dir.name}-final") if self.config.run.final_fit == "only" else trial_dir


def _try_again(row: Trial) -> Trial:
    return row.model_copy(update={"state": "running", "reason": "", "is_retryable": False})


def _describe(row: Trial) -> str:
    return ", ".join(f"{key}={to_text(value)}" for key, value in row.params.items())
