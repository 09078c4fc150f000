"""Compare methods on several datasets: a grid of means with the mean rank of each method.

Values of different tasks, or in different metrics, are not averaged; ranks are.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from petune.base.arguments import check_watch
from petune.base.config import Config
from petune.base.distributed import init_group
from petune.base.errors import CheckpointError, ConfigError
from petune.base.files import replace_file
from petune.base.metric import Metric
from petune.base.text import escape_markdown, html_table
from petune.runner.compare import compare
from petune.runner.compare_config import MAY_GROW, CompareConfig
from petune.runner.comparison import Comparison, Standing
from petune.runner.directory_kind import check_kind
from petune.runner.events import WatchRuns, on_dataset
from petune.runner.executors import Executor
from petune.runner.file_names import GRID_PAGE, GRID_TABLE
from petune.runner.report.tables import UNKNOWN
from petune.runner.run import check_task_of_dataset
from petune.runner.run_dir import open_run_dir
from petune.runner.saved_table import read_saved
from petune.runner.stored_config import write_config
from petune.training.events import Note
from petune.training.stop import StopFlag


class GridColumn(Config):
    """One dataset of a grid.

    Attributes:
        dataset, task: What was trained on, and for.
        metric: The main metric, on test.
        mean, std: By method, over seeds; methods that failed are missing, and one seed has no deviation.
        standing: By method, where seeds suffice to tell.
        conclusion: What the comparison on this dataset found, in sentences.
        intervals: What the intervals of its differences are, in a sentence.
    """

    dataset: str
    task: str
    metric: Metric
    mean: dict[str, float]
    std: dict[str, float] = {}
    standing: dict[str, Standing] = {}
    conclusion: str = ""
    intervals: str = ""

    def ranks(self, methods: Collection[str]) -> dict[str, float]:
        """Return the rank of each of these methods, 1 for the best; equal values share the mean of their ranks."""
        scores = {method: self.metric.score(self.mean[method]) for method in methods}
        return {
            method: 1 + sum(other > own for other in scores.values()) + (sum(o == own for o in scores.values()) - 1) / 2
            for method, own in scores.items()
        }

    def text(self, method: str) -> str:
        """Return `71.20 ± 0.30`, with `*` for the best method and `~` if it cannot be told apart from that."""
        if method not in self.mean:
            return UNKNOWN
        value = self.metric.number(self.mean[method])
        deviation = f" ± {self.metric.number(self.std[method])}" if method in self.std else ""
        first = max(self.mean, key=lambda method: self.metric.score(self.mean[method]))
        best = next((name for name, standing in self.standing.items() if standing == "best"), first)
        mark = " *" if self.mean[method] == self.mean[best] else " ~" if self.standing.get(method) == "tied" else ""
        return f"{value}{deviation}{mark}"


class Grid(Config):
    """Methods × datasets; saved as `grid.json` and `grid.md`.

    Attributes:
        methods: By mean rank, the best first; methods that failed somewhere come last and have none.
        columns: The datasets.
        reasons: Why a method failed, by dataset and method.
        output: The directory.
    """

    methods: tuple[str, ...]
    columns: tuple[GridColumn, ...]
    reasons: dict[str, dict[str, str]] = {}
    output: str

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Read `grid.json`.

        Raises:
            CheckpointError: It is missing or damaged.
        """
        return read_saved(cls, directory / GRID_TABLE, "is not the table of a grid")

    @property
    def has_means(self) -> bool:
        """True if the values of all datasets are of one task and metric, so that their mean says something."""
        return len({(column.task, column.metric) for column in self.columns}) == 1

    def mean(self, method: str) -> float | None:
        """Return the mean over the datasets; None if tasks differ, or the method failed on one."""
        if not self.has_means or not self._is_complete(method):
            return None
        return statistics.fmean(column.mean[method] for column in self.columns)

    def mean_rank(self, method: str) -> float | None:
        """Return the mean rank over the datasets; None if the method failed on one."""
        return mean_rank(method, self.columns)

    def _is_complete(self, method: str) -> bool:
        return all(method in column.mean for column in self.columns)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return headings and rows."""
        headings = ["method", *(f"{c.dataset} ({c.metric.label})" for c in self.columns)]
        headings += ["mean"] if self.has_means else []
        rows = []
        for method in self.methods:
            mean, rank = self.mean(method), self.mean_rank(method)
            means = [UNKNOWN if mean is None else self.columns[0].metric.number(mean)] if self.has_means else []
            cells = [column.text(method) for column in self.columns]
            rows.append([method, *cells, *means, UNKNOWN if rank is None else f"{rank:.2f}"])
        return [*headings, "mean rank"], rows

    @property
    def about(self) -> str:
        """Return what the numbers of the table are."""
        lower = list(dict.fromkeys(c.metric.label for c in self.columns if not c.metric.higher_is_better))
        percent = list(dict.fromkeys(c.metric.label for c in self.columns if c.metric.percent))
        sentences = ["On test: mean ± sample standard deviation over the seeds; * marks the best of a dataset."]
        is_tied = any("tied" in column.standing.values() for column in self.columns)
        sentences += ["~ marks those that cannot be told apart from it."] if is_tied else []
        sentences += (
            []
            if all(map(self._is_complete, self.methods))
            else ["Ranks are those among the methods that every dataset has."]
        )
        sentences += [f"In percent: {', '.join(percent)}."] if percent else []
        sentences += [f"Lower is better: {', '.join(lower)}."] if lower else []
        sentences += [] if self.has_means else ["Tasks or metrics differ, so only ranks are averaged."]
        return " ".join(sentences)

    def page(self) -> str:
        """Return `grid.md`."""
        headings, rows = self.table()
        lines = [
            "# Methods on several datasets",
            "",
            self.about,
            "",
            "| " + " | ".join(map(_cell, headings)) + " |",
            "| --- |" + " ---: |" * (len(headings) - 1),
            *("| " + " | ".join(map(_cell, row)) + " |" for row in rows),
        ]
        found = [f"- {sentence}" for sentence in self.conclusions()]
        lines += ["", *map(escape_markdown, found), "", *self.intervals()] if found else []
        failed = [f"- {reason}" for reason in self.failures()]
        return "\n".join([*lines, *(["", "Failed:", "", *map(escape_markdown, failed)] if failed else []), ""])

    def conclusions(self) -> list[str]:
        """Return what was found on each dataset that more than one method finished on."""
        return [f"{column.dataset}: {column.conclusion}" for column in self.columns if column.conclusion]

    def intervals(self) -> list[str]:
        """Return what the intervals are; one sentence, unless datasets have other numbers of methods or seeds."""
        return list(dict.fromkeys(column.intervals for column in self.columns if column.intervals))

    def failures(self) -> list[str]:
        """Return `vpt on digits: why it failed` for each method and dataset that failed."""
        return [f"{method} on {d}: {reason}" for d, by in self.reasons.items() for method, reason in by.items()]

    def _repr_html_(self) -> str:
        """Show the table in a notebook."""
        headings, rows = self.table()
        return html_table(rows, headings)


def mean_rank(method: str, columns: Sequence[GridColumn]) -> float | None:
    """Return the mean rank of a method among those that all columns have; None if it is missing in one."""
    complete = set.intersection(*(set(column.mean) for column in columns))
    if method not in complete:
        return None
    return statistics.fmean(column.ranks(complete)[method] for column in columns)


def compare_datasets(
    config: CompareConfig | None = None,
    *,
    executor: str | Executor = "serial",
    watch: WatchRuns = lambda event: None,
    **fields: Any,
) -> Grid:
    """Compare methods on each of several datasets: `petune.compare_datasets(methods=…, datasets=("a", "b"))`.

    Each dataset has its comparison in a directory inside. If interrupted, call it again to resume.

    Args:
        config: The comparison, with `datasets`; without it, `fields` are those of a CompareConfig.
        executor, watch: See `petune.compare`.

    Raises:
        ConfigError: There are no `datasets`.
        PetuneError: See `petune.compare`.
    """
    check_watch("petune.compare_datasets", watch)
    config = CompareConfig.from_call(config, fields, "petune.compare_datasets(...)").completed()
    if not config.datasets:
        raise ConfigError("no datasets to compare on. Name them as datasets", cli_hint="Repeat --dataset")
    config.run.check_one_fold()
    config.run.check_final_fit()
    parts = {dataset: config.on(dataset) for dataset in config.datasets}
    group = init_group()
    for part in parts.values():  # names are checked before the first dataset trains
        group.main_first(lambda part=part: check_task_of_dataset(part.run))  # type: ignore[misc]
    run_dir = config.directory
    group.broadcast(lambda: check_kind(run_dir, "compare"))
    stored = config.to_store()
    opened = open_run_dir(
        run_dir, stored, resume=True, command="compare", may_change=MAY_GROW, tables=(GRID_TABLE, GRID_PAGE)
    )
    with group.on_main(opened), StopFlag() as stop:
        group.broadcast(lambda: write_config(run_dir, stored, "compare"))
        comparisons = {}
        for name, part in parts.items():
            stop.check(group)
            comparisons[name] = compare(part, executor=executor, watch=on_dataset(name, watch))
        grid = make_grid(config, comparisons)
        omitted = group.broadcast(lambda: _omitted_columns(config))
        if omitted:
            watch(Note(f"not in the table this time: {', '.join(omitted)}. Their comparisons stay in {run_dir}"))
        group.broadcast(lambda: _write(grid, config))
    return grid


def make_grid(config: CompareConfig, comparisons: Mapping[str, Comparison]) -> Grid:
    """Collect the comparisons of several datasets."""
    columns = []
    reasons = {}
    for dataset, comparison in comparisons.items():
        main = comparison.metric_info[0]
        done = [row for row in comparison.rows if main.name in row.mean]
        columns.append(
            GridColumn(
                dataset=dataset,
                task=comparison.task,
                metric=main,
                mean={row.method: row.mean[main.name] for row in done},
                std={row.method: row.std[main.name] for row in done if main.name in row.std},
                standing={row.method: row.standing for row in done if row.standing is not None},
                conclusion=comparison.conclusion,
                intervals=comparison.intervals,
            )
        )
        failed = {row.method: row.reason for row in comparison.rows if row.status == "failed"}
        if failed:
            reasons[dataset] = failed
    ranks = {method: mean_rank(method, columns) for method in config.methods}
    methods = sorted(config.methods, key=lambda method: (ranks[method] is None, ranks[method] or 0.0))
    return Grid(methods=tuple(methods), columns=tuple(columns), reasons=reasons, output=str(config.directory))


def _omitted_columns(config: CompareConfig) -> list[str]:
    """List the datasets of the existing table that were not asked for now."""
    try:
        columns = Grid.read(config.directory).columns
    except CheckpointError:
        return []
    return [column.dataset for column in columns if column.dataset not in config.datasets]


def _write(grid: Grid, config: CompareConfig) -> None:
    replace_file(config.directory / GRID_TABLE, (grid.model_dump_json(indent=1) + "\n").encode())
    replace_file(config.directory / GRID_PAGE, grid.page().encode())


def _cell(text: str) -> str:
    return escape_markdown(text)
