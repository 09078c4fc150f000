"""Cross-validation: one run for each fold, and the mean of each metric with its confidence interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from petune.base.arguments import check_watch
from petune.base.config import Config
from petune.base.distributed import init_group
from petune.base.errors import ConfigError
from petune.base.files import replace_file
from petune.base.metric import Metric, shown_metrics
from petune.base.text import html_table
from petune.runner.differences import CONFIDENCE
from petune.runner.file_names import FOLDS_TABLE
from petune.runner.result import RunResult
from petune.runner.run import run
from petune.runner.run_config import RunConfig
from petune.runner.run_name import run_name
from petune.training.events import Note, Watch, ignore


class CrossValidation(Config):
    """The result of a cross-validation; saved as `folds.json`.

    Attributes:
        metric_info: How to show the metrics, the main one first.
        metrics: On the test fold of each run, by name: a value per fold.
        output: The directory, with a run in `fold-1`, `fold-2`, …
    """

    method: str
    dataset: str
    task: str
    metric_info: tuple[Metric, ...]
    metrics: dict[str, tuple[float, ...]]
    output: str

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


def cross_validate(config: RunConfig | None = None, *, watch: Watch = ignore, **fields: Any) -> CrossValidation:
    """Run once for each fold: `petune.cross_validate(method="vpt", dataset="folder:pets", folds=5)`.

    If interrupted, call it again with the same output to resume; finished folds are not repeated.

    Args:
        config: The run, with `folds`; without it, `fields` are those of a RunConfig.
        watch: Called with every step, epoch and note.

    Raises:
        ConfigError: There are no `folds`, or one `fold` is named.
        DataError: A fold is empty, or lacks a class.
    """
    check_watch("petune.cross_validate", watch)
    config = RunConfig.from_call(config, fields, "petune.cross_validate(...)")
    if config.folds is None or config.fold is not None:
        raise ConfigError("cross-validation needs the number of folds, and no single fold", cli_hint="Give --folds 5")
    output = config.output or Path("runs") / f"{run_name(config)}-folds{config.folds}"
    results = []
    for fold in range(1, config.folds + 1):
        watch(Note(f"fold {fold} of {config.folds}"))
        own = config.model_copy(update={"fold": fold, "output": output / f"fold-{fold}", "resume": True})
        results.append(run(own, watch=watch))
    validation = _summarize(results, output)
    text = validation.model_dump_json(indent=1) + "\n"
    init_group().broadcast(lambda: replace_file(output / FOLDS_TABLE, text.encode()))
    return validation


def _summarize(results: Sequence[RunResult], output: Path) -> CrossValidation:
    first = results[0]
    names = [name for name in first.metrics if all(name in result.metrics for result in results)]
    return CrossValidation(
        method=first.method,
        dataset=first.dataset,
        task=first.task,
        metric_info=first.metric_info,
        metrics={name: tuple(result.metrics[name] for result in results) for name in names},
        output=str(output),
    )
