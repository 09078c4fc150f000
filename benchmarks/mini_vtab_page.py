"""Show the suite mini-vtab in docs/results.md: a heat map of methods and datasets, mean ranks, cost and accuracy.

Ranks are compared as Demšar does (Statistical Comparisons of Classifiers over Multiple Data Sets, JMLR 7, 2006): a
Friedman test over the datasets, then Nemenyi's critical difference of mean ranks. The cost is measured apart, because
the runs of a suite take hours on a machine that does other things too; on an idle one:

    python benchmarks/speed.py --sizes vit_nano --no-memory --output benchmarks/results/speed-methods \\
        --methods linear vpt vpt:deep=false lora ...
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scipy.stats import friedmanchisquare, studentized_range

from petune.base.files import replace_file
from petune.base.text import plural
from petune.runner.conclusion import listed
from petune.runner.report.plots import INK, draw, to_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUITE = "mini-vtab"
RESULTS = Path(__file__).resolve().parent / "results"
FIGURE, SPEED = RESULTS / f"{SUITE}.svg", RESULTS / "speed-methods" / "speed.json"
LEVEL = 0.05
BASELINE = "linear"
LARGEST_STEP = 15.0
"""Points above or below the linear probe at which the color of the heat map no longer changes."""
Results = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Table:
    """Methods × datasets.

    Attributes:
        datasets: In the order of the suite.
        top1: Mean over seeds on test, by method, one number for each dataset; methods that lack one are left out.
        rank: Mean rank over the datasets, 1 for the best; equal values share the mean of their ranks.
        percent: Trained parameters with the classifier in percent of backbone and classifier, mean over the datasets.
        step: Time of a training step divided by that of AdaptFormer's, measured in turns; of methods in SPEED.
    """

    datasets: tuple[str, ...]
    top1: Mapping[str, tuple[float, ...]]
    rank: Mapping[str, float]
    percent: Mapping[str, float]
    step: Mapping[str, float]

    @property
    def ranked(self) -> list[str]:
        """The methods, the best mean rank first."""
        return sorted(self.rank, key=lambda method: (self.rank[method], method))

    @property
    def critical_difference(self) -> float:
        """The smallest difference of two mean ranks that Nemenyi's test calls significant."""
        k = len(self.rank)
        quantile = float(studentized_range.ppf(1 - LEVEL, k, math.inf)) / math.sqrt(2)
        return quantile * math.sqrt(k * (k + 1) / (6 * len(self.datasets)))

    @property
    def p_value(self) -> float:
        """The p-value of Friedman's test that all methods rank alike."""
        return float(friedmanchisquare(*self.top1.values()).pvalue)


def read_table(pieces: Sequence[str], results: Results) -> Table | None:
    """Return the table; None unless three methods, the baseline among them, are complete on all datasets."""
    missing = missing_datasets(pieces, results)
    methods = [method for method, datasets in missing.items() if not datasets]
    if len(methods) < 3 or BASELINE not in methods:
        return None
    rows = [_complete_rows(results[piece]) for piece in pieces]
    top1 = {m: tuple(float(column[m]["mean"]["top1"]) for column in rows) for m in methods}
    ranks = [_ranks({m: values[i] for m, values in top1.items()}) for i in range(len(pieces))]
    return Table(
        tuple(map(_dataset, pieces)),
        top1,
        {m: _mean([rank[m] for rank in ranks]) for m in methods},
        {m: _mean([column[m]["percent_of_backbone"] for column in rows]) for m in methods},
        step_times(),
    )


def missing_datasets(pieces: Sequence[str], results: Results) -> dict[str, list[str]]:
    """Return the datasets that each method lacks, or has with fewer seeds than others; of methods with any result."""
    rows = {piece: _complete_rows(results[piece]) if piece in results else {} for piece in pieces}
    methods = dict.fromkeys(row["method"] for piece in pieces for row in results.get(piece, {}).get("rows", ()))
    return {m: [_dataset(piece) for piece in pieces if m not in rows[piece]] for m in methods}


def _complete_rows(comparison: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the rows that have as many seeds as any, by method."""
    most = max((len(row["seeds"]) for row in comparison["rows"]), default=0)
    return {row["method"]: row for row in comparison["rows"] if row["status"] == "done" and len(row["seeds"]) == most}


def _dataset(piece: str) -> str:
    return piece.removeprefix(f"{SUITE}-")


def step_times(file: Path = SPEED) -> dict[str, float]:
    """Return the time of a step by method, relative to AdaptFormer's; nothing if it was not measured."""
    if not file.exists():
        return {}
    ratios = json.loads(file.read_bytes())["steps"]["vit_nano"]["petune_is_faster_by"]
    return {name.removeprefix("petune "): float(ratio["median"]) for name, ratio in ratios.items()}


def section(pieces: Sequence[str], results: Results) -> list[str]:
    """Return the lines for docs/results.md."""
    table = read_table(pieces, results)
    missing = missing_datasets(pieces, results)
    if table is None:
        return [_so_far(pieces, missing), ""]
    header = ("method", "mean rank", "mean top-1", *table.datasets, "% of backbone", "step")
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    for method in table.ranked:
        values = table.top1[method]
        numbers = [f"{table.rank[method]:.1f}", *(f"{value:.2f}" for value in (_mean(values), *values))]
        step = f"{table.step[method]:.2f}" if method in table.step else "–"
        cost = [f"{table.percent[method]:.2f}", step]
        lines.append("| " + " | ".join([f"`{method}`", *numbers, *cost]) + " |")
    note = (
        "Top-1 on test in percent, means over the seeds. The time of a step is relative to AdaptFormer's, measured in "
        "turns on an idle machine (benchmarks/speed.py); a linear probe trains faster, as its features are kept."
    )
    left_out = [f"`{method}` (no complete {listed(lacks)})" for method, lacks in missing.items() if lacks]
    note += (
        f" Left out, because not all seeds of all datasets have been measured: {listed(left_out)}." if left_out else ""
    )
    figure = f"![Top-1 of each method on each dataset, and mean ranks](../benchmarks/results/{FIGURE.name})"
    return [" ".join(sentences(table)), "", figure, "", *lines, "", note, ""]


def _so_far(pieces: Sequence[str], missing: Mapping[str, Sequence[str]]) -> str:
    counts = {name: sum(name not in lacks for lacks in missing.values()) for name in map(_dataset, pieces)}
    measured = {name: count for name, count in counts.items() if count}
    methods = ", ".join(f"{name} with {plural(count, 'method')}" for name, count in measured.items()) or "none"
    return (
        f"**{len(measured)} of {plural(len(pieces), 'dataset')} measured so far** ({methods}); the heat map needs "
        f"three methods, `{BASELINE}` among them, on all."
    )


def sentences(table: Table) -> list[str]:
    """Say what the table shows and what it does not."""
    best, cd = table.ranked[0], table.critical_difference
    alike = [m for m in table.ranked[1:] if table.rank[m] - table.rank[best] < cd]
    worse = [m for m in table.ranked[1:] if m not in alike]
    tail = f"worse than it are {_names(worse)}" if worse else "no method is worse than it"
    found = (
        f"{_names([best])} has the best mean rank ({table.rank[best]:.1f}), and by Nemenyi's test at {LEVEL:g} (mean "
        f"ranks that differ by {cd:.1f} or more) {tail}."
    )
    gain = max(table.ranked, key=lambda m: min(_above_baseline(table, m)))
    least = min(_above_baseline(table, gain))
    steady = (
        f"On its worst dataset {_names([gain])} is {least:+.1f} points from the linear probe; no other does better."
    )
    means = [table.rank[method] for method in table.ranked]
    is_close = all(after - before < cd for before, after in itertools.pairwise(means))
    neighbors = ", and differences between neighbors in this list are not significant" if is_close else ""
    limits = (
        f"{plural(len(table.datasets), 'dataset')} of small images and one small backbone say little about others: "
        f"Friedman's test that all {len(table.rank)} methods rank alike has p = {table.p_value:.2g}{neighbors}."
    )
    return [found, steady, limits]


def figure(table: Table) -> bytes:
    """Return the heat map with the mean ranks beside it, as SVG."""

    def content(figure: Figure) -> None:
        heat, ranks = figure.subplots(1, 2, width_ratios=(2.4, 1), sharey=True)
        _draw_heat(heat, table)
        _draw_ranks(ranks, table)

    return to_file(draw(content, (8.0, 1.2 + 0.32 * len(table.rank))))


def write_figure(pieces: Sequence[str], results: Results) -> None:
    """Write the figure, if everything for it has been measured."""
    table = read_table(pieces, results)
    if table is not None:
        replace_file(FIGURE, figure(table))


def _draw_heat(axes: Axes, table: Table) -> None:
    gains = [_above_baseline(table, method) for method in table.ranked]
    axes.imshow(gains, cmap="RdBu", vmin=-LARGEST_STEP, vmax=LARGEST_STEP, aspect="auto")
    for y, method in enumerate(table.ranked):
        for x, value in enumerate(table.top1[method]):
            color = "#ffffff" if abs(gains[y][x]) > 0.7 * LARGEST_STEP else "#000000"
            axes.text(x, y, f"{value:.1f}", ha="center", va="center", color=color, fontsize=9)
    axes.set_xticks(range(len(table.datasets)), [name.replace("_", "\n") for name in table.datasets])
    axes.set_yticks(range(len(table.ranked)), table.ranked)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("top-1; blue: above the linear probe", fontsize=10)


def _draw_ranks(axes: Axes, table: Table) -> None:
    best = table.rank[table.ranked[0]]
    axes.axvspan(best, best + table.critical_difference, color=INK, alpha=0.12, linewidth=0)
    axes.plot([table.rank[method] for method in table.ranked], range(len(table.ranked)), "o", color="#3b82d6")
    axes.set_xlim(0.5, len(table.rank) + 0.5)
    axes.set_xlabel("mean rank")
    axes.grid(axis="x")
    axes.tick_params(axis="y", length=0)
    axes.set_title("gray: not told apart\nfrom the best", fontsize=10)


def _above_baseline(table: Table, method: str) -> list[float]:
    reference = table.top1[BASELINE]
    return [value - other for value, other in zip(table.top1[method], reference, strict=True)]


def _ranks(values: Mapping[str, float]) -> dict[str, float]:
    above = {m: sum(other > value for other in values.values()) for m, value in values.items()}
    equal = {m: sum(other == value for other in values.values()) - 1 for m, value in values.items()}
    return {m: 1 + above[m] + equal[m] / 2 for m in values}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _names(methods: Sequence[str]) -> str:
    return listed([f"`{method}`" for method in methods])
