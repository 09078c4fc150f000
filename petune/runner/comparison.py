"""The result of a comparison: one row per method over all seeds, and where each run was measured."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import model_validator

from petune.base.config import Config
from petune.base.files import replace_file
from petune.base.metric import Metric
from petune.base.text import html_table
from petune.runner.compare_config import CompareConfig
from petune.runner.differences import Difference
from petune.runner.file_names import COMPARE_PAGE, COMPARE_PLOT, COMPARE_TABLE
from petune.runner.migrations import updated_comparison
from petune.runner.report.charts import metric_file
from petune.runner.report.tables import cells, compare_columns, comparison_page, ranked, seeds_by_method
from petune.runner.result import RunResult
from petune.runner.saved_table import read_saved

Standing = Literal["best", "tied", "below"]
"""Of a method: the best one, one that cannot be told apart from the best one, or one that is clearly below it."""


class Row(Config):
    """One method over all seeds. A method that failed has a reason and no numbers.

    Attributes:
        metrics: On test, by the metric's name: a value per seed.
        mean, std: On test, by the metric's name; the sample standard deviation over seeds, missing for one seed.
        val_mean: On val, by the metric's name.
        lr: Peak learning rate, from the recipe or as given.
        epochs: Of the longest run; `train.patience` may have ended others before.
        difference: To the baseline or the best method, in the main metric on test; None for that method itself.
        standing: In the main metric on test; None if there are too few seeds to tell.
        images_per_s, step_time_s: Mean over the seeds.
        num_frames: Frames of a clip, of which `images_per_s` then is; None for images.
        peak_memory_bytes, time_s: The largest, and the sum, over the seeds.
    """

    method: str
    status: Literal["done", "failed"]
    reason: str = ""
    seeds: tuple[int, ...] = ()
    tuned: int | None = None
    head: int | None = None
    total: int | None = None
    percent_of_total: float | None = None
    percent_of_backbone: float | None = None
    adapter_bytes: int | None = None
    metrics: dict[str, tuple[float, ...]] = {}
    lr: float | None = None
    epochs: int | None = None
    mean: dict[str, float] = {}
    std: dict[str, float] = {}
    val_mean: dict[str, float] = {}
    difference: Difference | None = None
    standing: Standing | None = None
    images_per_s: float | None = None
    step_time_s: float | None = None
    peak_memory_bytes: int | None = None
    time_s: float | None = None
    num_frames: int | None = None

    @model_validator(mode="after")
    def _done_has_numbers(self) -> Self:
        # one seed has no deviation, a run without val no metrics on it, and older versions did not write the rest
        optional = {"std", "val_mean", "difference", "standing", "epochs", "step_time_s", "num_frames"}
        if not self.metrics and not self.mean:  # every metric is undefined on these images
            optional |= {"metrics", "mean"}
        missing = [key for key, value in self if value in (None, (), {}) and key not in optional]
        if self.status == "done" and missing:
            raise ValueError(f"a method that is done lacks {', '.join(missing)}")
        return self


ORIGIN_KEYS = ("device", "threads", "precision", "versions", "git")
"""The parts of the provenance that tell one Origin from another."""


class Origin(Config):
    """Which runs were measured under the same conditions: seeds by method, and their provenance."""

    runs: dict[str, tuple[int, ...]]
    provenance: dict[str, Any]


class Comparison(Config):
    """The table of a comparison; saved as `compare.json`, with `compare.md` and `compare.svg`.

    Attributes:
        task, metric_info: Of all runs; the first metric sorts the rows.
        provenance: Of the last run.
        conclusion: What was found, in sentences: the best method, clear differences and those that are not, runs in
            different number formats; empty with a single method in one format.
        intervals: What the intervals of the differences are, in a sentence.
        origins: Filled in where runs differ in machine, threads, number format, versions or commit.
    """

    config: CompareConfig
    task: str
    metric_info: tuple[Metric, ...]
    rows: tuple[Row, ...]
    backbone: str
    weights: str
    provenance: dict[str, Any]
    origins: tuple[Origin, ...] = ()
    output: str
    conclusion: str = ""
    intervals: str = ""

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Read `compare.json`, of this version or an older one.

        Raises:
            CheckpointError: It is missing or damaged.
        """
        return read_saved(cls, directory / COMPARE_TABLE, "is not the table of a comparison", updated_comparison)

    @property
    def formats(self) -> list[str]:
        """Return the number formats that the runs computed in."""
        every = [origin.provenance for origin in self.origins] or [self.provenance]
        return list(dict.fromkeys(one["precision"] for one in every if one.get("precision")))

    def write(self, directory: Path) -> None:
        """Write `compare.json`, `compare.md` and `compare.svg` into an existing directory."""
        replace_file(directory / COMPARE_TABLE, (self.model_dump_json(indent=1) + "\n").encode())
        self.write_pages(directory)

    def write_pages(self, directory: Path) -> None:
        """Write `compare.md` and `compare.svg` into an existing directory."""
        plain = self.model_dump(mode="json")
        replace_file(directory / COMPARE_PAGE, comparison_page(plain).encode())
        done = [row for row in ranked(plain["rows"], self.metric_info) if row["status"] == "done"]
        title = f"{self.config.run.backbone} on {self.config.run.dataset}"
        replace_file(directory / COMPARE_PLOT, metric_file(done, self.metric_info[0], title))

    def _repr_html_(self) -> str:
        """Show the table in a notebook."""
        plain = ranked([row.model_dump(mode="json") for row in self.rows], self.metric_info)
        columns = compare_columns(self.metric_info, plain)
        rows = [cells(row, columns) for row in plain]
        caption = f"{self.backbone}, weights {self.weights}, on {self.config.run.dataset}"
        return html_table(rows, list(columns), caption)


def summarize(method: str, results: Sequence[RunResult], reason: str = "") -> Row:
    """Return the row of a method.

    Args:
        method: As it is written.
        results: Of its finished runs.
        reason: Why it failed, if it did.
    """
    if reason or not results:
        return Row(method=method, status="failed", reason=reason or "no run finished")
    first = results[0]
    if reason := _why_not_comparable(results):
        return Row(method=method, status="failed", reason=reason)
    metrics = _by_name([result.metrics for result in results])
    val_metrics = _by_name([result.val_metrics or {} for result in results])
    return Row(
        method=method,
        status="done",
        seeds=tuple(result.seed for result in results),
        tuned=first.tuned,
        head=first.head,
        total=first.total,
        percent_of_total=first.percent_of_total,
        percent_of_backbone=first.percent_of_backbone,
        adapter_bytes=first.adapter_bytes,
        lr=first.lr,
        epochs=max(result.epochs for result in results),
        metrics=metrics,
        mean={name: statistics.fmean(values) for name, values in metrics.items()},
        std={name: statistics.stdev(values) for name, values in metrics.items() if len(values) > 1},
        val_mean={name: statistics.fmean(values) for name, values in val_metrics.items()},
        images_per_s=statistics.fmean(result.images_per_s for result in results),
        step_time_s=statistics.fmean(result.step_time_s for result in results),
        peak_memory_bytes=max(result.peak_memory_bytes for result in results),
        time_s=sum(result.time_s for result in results),
        num_frames=first.num_frames,
    )


def _by_name(metrics: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, ...]]:
    """Return a value per seed for each metric that is defined for all seeds."""
    names = [name for name in metrics[0] if all(name in values for values in metrics)]
    return {name: tuple(values[name] for values in metrics) for name in names}


def _why_not_comparable(results: Sequence[RunResult]) -> str:
    """Say which seeds of one method trained something else; empty if all trained the same."""
    first = results[0]
    same = (first.lr, first.tuned, first.head)
    other = next((result for result in results if (result.lr, result.tuned, result.head) != same), None)
    if other is None:
        return ""
    return (
        f"seeds {first.seed} and {other.seed} differ: {first.tuned:,} and {other.tuned:,} parameters train at learning "
        f"rates of {first.lr:g} and {other.lr:g}. The method's package was updated between them. Remove "
        f"{first.output} or {other.output}, and compare again"
    )


def note_of_formats(results: Sequence[RunResult]) -> str:
    """Say which runs computed in which number format, if they differ; empty if all are the same."""
    runs: dict[str, dict[str, tuple[int, ...]]] = {}
    for result in results:
        seeds = runs.setdefault(str(result.provenance.get("precision")), {})
        seeds[result.method] = (*seeds.get(result.method, ()), result.seed)
    if len(runs) < 2:
        return ""
    listed = "; ".join(f"{name}: {seeds_by_method(of_method)}" for name, of_method in runs.items())
    return f"The runs differ in number format, so their speed cannot be compared ({listed})."


def origins_of(results: Sequence[RunResult]) -> tuple[Origin, ...]:
    """Group runs by the conditions they were measured under; empty if all are the same."""
    groups: dict[str, Origin] = {}
    for result in results:
        conditions = {key: result.provenance.get(key) for key in ORIGIN_KEYS}
        origin = groups.setdefault(json.dumps(conditions, sort_keys=True), Origin(runs={}, provenance=conditions))
        origin.runs[result.method] = (*origin.runs.get(result.method, ()), result.seed)
    return tuple(groups.values()) if len(groups) > 1 else ()
