"""Cross-validation: one run for each fold, and the mean of each metric with its confidence interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from petune.base.arguments import check_arguments, check_watch
from petune.base.config import Config
from petune.base.distributed import init_group
from petune.base.errors import ConfigError, UsageError
from petune.base.files import replace_file
from petune.base.metric import Metric, shown_metrics
from petune.base.text import html_table
from petune.runner.differences import CONFIDENCE
from petune.runner.events import RunStarted, WatchRuns
from petune.runner.file_names import CONFIG_FILE, FOLDS_TABLE
from petune.runner.recipes import complete_run
from petune.runner.result import RunResult
from petune.runner.run import run
from petune.runner.run_config import RunConfig
from petune.runner.run_dir import NEW_OUTPUT, check_run_dir
from petune.runner.run_inputs import check_pixels_of_runs
from petune.runner.run_name import run_name
from petune.runner.saved_table import read_saved
from petune.training.stop import StopFlag


class CrossValidation(Config):
    """The result of a cross-validation; saved as `folds.json`.

    Attributes:
        metric_info: How to show the metrics, the main one first.
        metrics: On the test fold, by name: a value per fold, the mean over the seeds.
        seeds: Each fold ran once with each; the folds are the same for all.
        output: The directory, with a run in `fold-1`, `fold-2`, …, or `fold-1-seed0`, … for several seeds.
    """

    method: str
    dataset: str
    task: str
    metric_info: tuple[Metric, ...]
    metrics: dict[str, tuple[float, ...]]
    seeds: tuple[int, ...] = ()
    output: str

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Read `folds.json`.

        Raises:
            CheckpointError: It is missing or damaged.
        """
        return read_saved(cls, directory / FOLDS_TABLE, "is not the table of a cross-validation")

    def mean(self, name: str) -> float:
        """Return the mean of a metric over the folds."""
        return statistics.fmean(self.metrics[name])

    def interval(self, name: str) -> tuple[float, float]:
        """Return Student's 95 % interval of the mean. Training sets of folds overlap, so it is somewhat too narrow."""
        from scipy.stats import t

        values = self.metrics[name]
        half = float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
        return self.mean(name) - half, self.mean(name) + half

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return headings and rows: a row for each metric."""
        shown = [metric for metric in shown_metrics(self.metric_info) if metric.name in self.metrics]
        rows = []
        for metric in shown:
            values = self.metrics[metric.name]
            low, high = (metric.number(bound) for bound in self.interval(metric.name))
            rows.append(
                [metric.label, metric.number(self.mean(metric.name)), f"[{low}, {high}]", *map(metric.number, values)]
            )
        folds = len(next(iter(self.metrics.values())))
        return ["metric", "mean", "95 % interval", *(f"fold {number}" for number in range(1, folds + 1))], rows

    def _repr_html_(self) -> str:
        """Show the table in a notebook."""
        headings, rows = self.table()
        return html_table(rows, headings)


def cross_validate(
    config: RunConfig | None = None,
    *,
    seeds: Sequence[int] | None = None,
    watch: WatchRuns = lambda event: None,
    **fields: Any,
) -> CrossValidation:
    """Run once for each fold: `petune.cross_validate(method="vpt", dataset="folder:pets", folds=5)`.

    If interrupted, call it again with the same output to resume; finished folds are not repeated.

    Args:
        config: The run, with `folds`; without it, `fields` are those of a RunConfig.
        seeds: Run each fold with each of them; a fold's value is the mean over them. None takes the run's seed.
        watch: Called with every run, step, epoch and note.

    Raises:
        ConfigError: There are no `folds`, or one `fold` is named.
        UsageError: The output holds something else.
        DataError: A fold is empty, or lacks a class.
        Stopped: A signal came. Everything done so far is saved.
    """
    check_watch("petune.cross_validate", watch)
    check_arguments("petune.cross_validate", seeds=(seeds, Sequence | None))
    config = complete_run(RunConfig.from_call(config, fields, "petune.cross_validate(...)"))
    runs = fold_runs(config, seeds)
    group = init_group()
    group.broadcast(lambda: check_fold_runs(runs))
    group.broadcast(lambda: check_pixels_of_runs(runs))
    results = []
    with StopFlag() as stop:
        for index, own in enumerate(runs):
            stop.check(group)
            done = own.output is not None and RunResult.exists(own.output)
            watch(RunStarted(f"{own.method}, fold {own.fold}", own.seed, index, len(runs), done))
            results.append(run(own, watch=watch))
    validation = _summarize(results, runs)
    text = validation.model_dump_json(indent=1) + "\n"
    group.broadcast(lambda: replace_file(Path(validation.output) / FOLDS_TABLE, text.encode()))
    return validation


def fold_runs(config: RunConfig, seeds: Sequence[int] | None = None) -> list[RunConfig]:
    """Return the runs of a cross-validation, each in its own directory: folds first, and then seeds.

    Args:
        config: The run, with `folds`.
        seeds: See `cross_validate`.

    Raises:
        ConfigError: There are no `folds`, one `fold` is named, a seed is given twice, or see `check_final_fit`.
    """
    if config.folds is None or config.fold is not None:
        raise ConfigError("cross-validation needs the number of folds, and no single fold", cli_hint="Give --folds 5")
    if seeds is not None and (not seeds or len({*seeds}) < len(seeds)):
        raise ConfigError(f"seeds are {', '.join(map(str, seeds)) or 'empty'}. Give at least one, and each once")
    config.check_final_fit()
    output = config.output or Path("runs") / f"{_name(config, seeds)}-folds{config.folds}"
    runs = []
    for fold in range(1, config.folds + 1):
        for seed in [config.seed] if seeds is None else seeds:
            name = f"fold-{fold}" if seeds is None else f"fold-{fold}-seed{seed}"
            values = {"fold": fold, "seed": seed, "output": output / name, "resume": True}
            RunConfig.build({"seed": seed})  # copies are not checked
            runs.append(config.model_copy(update=values))
    return runs


def _name(config: RunConfig, seeds: Sequence[int] | None) -> str:
    return run_name(config) if seeds is None else run_name(config).removesuffix(f"-seed{config.seed}") + "-seeds"


def check_fold_runs(runs: Sequence[RunConfig]) -> None:
    """Check that the directories of a cross-validation can be used, and write nothing.

    Raises:
        UsageError: The directory, or one inside, holds something else.
    """
    for own in runs:
        assert own.output is not None
        if (own.output.parent / CONFIG_FILE).exists():
            raise UsageError(
                f"{own.output.parent} holds a run or a comparison. Use another output for the cross-validation",
                cli_hint=NEW_OUTPUT,
            )
        check_run_dir(own.output, own, resume=True, command="run")


def _summarize(results: Sequence[RunResult], runs: Sequence[RunConfig]) -> CrossValidation:
    first = results[0]
    seeds = tuple(dict.fromkeys(own.seed for own in runs))
    names = [name for name in first.metrics if all(name in result.metrics for result in results)]
    starts = range(0, len(results), len(seeds))
    folds = [results[start : start + len(seeds)] for start in starts]
    return CrossValidation(
        method=first.method,
        dataset=first.dataset,
        task=first.task,
        metric_info=first.metric_info,
        metrics={name: tuple(statistics.fmean(r.metrics[name] for r in fold) for fold in folds) for name in names},
        seeds=seeds,
        output=str(Path(str(runs[0].output)).parent),
    )
