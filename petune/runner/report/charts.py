"""The figures of comparisons and reports: a metric over size, curves over epochs, costs."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from petune.base.metric import LOSS, Metric
from petune.base.text import capitalized, matplotlib_text
from petune.runner.report.labels import Point, label_points, number_points
from petune.runner.report.plots import COLORS, INK, WIDTH, draw, set_count_axis, to_file, to_markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]
"""Rows of `compare.json` that are done."""
PLOT_HEIGHT, KEY_LINE = 3.4, 0.2
"""Inches: of a plot, and of a line of the key below it."""
LONGEST_BAR, LONGEST_LINE, LONGEST_LABEL = 34, 46, 30
"""Letters of a name at a bar, of one over the width of the figure, and of a line along its height."""


@dataclass(frozen=True)
class Chart:
    """A figure for an HTML page.

    Attributes:
        svg: Safe markup.
        caption: What it shows.
        note: A sentence below the caption.
        key: Color and name of each line or point, where the figure does not name them.
    """

    svg: str
    caption: str
    note: str = ""
    key: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Curve:
    """The epochs of one run; runs with the same label share a color."""

    label: str
    epochs: Sequence[Mapping[str, float]]


def metric_file(rows: Rows, metric: Metric, title: str) -> bytes:
    """Return `compare.svg`: a metric on test over trained parameters; a bar spans one standard deviation each way.

    Points are named in the plot, or numbered and named below it where there are too many.
    """
    rows = _with_value(rows, metric)
    figure, names_fit = _metric_figure(rows, metric, title)
    if not names_fit:
        figure, _ = _metric_figure(rows, metric, title, with_key=True)
    return to_file(figure)


def metric_chart(salt: str, rows: Rows, metric: Metric) -> Chart:
    """Return the same figure for a page, where the key is part of the page."""
    rows = _with_value(rows, metric)
    figure, names_fit = _metric_figure(rows, metric, "")
    key = [] if names_fit else [(_color(i), f"{i + 1}  {row['method']}") for i, row in enumerate(rows)]
    caption = f"{capitalized(metric.label)} on test over trained parameters"
    return Chart(to_markup(figure, f"metric {salt}"), caption, pareto_caption(rows, metric), key)


def pareto_rows(rows: Rows, metric: Metric) -> list[Mapping[str, Any]]:
    """Return the rows that are better than every row with as many trained parameters or fewer; the fewest first."""
    front: list[Mapping[str, Any]] = []
    for row in sorted(rows, key=lambda row: (_trained(row), -metric.score(row["mean"][metric.name]))):
        if not front or metric.score(row["mean"][metric.name]) > metric.score(front[-1]["mean"][metric.name]):
            front.append(row)
    return front


def pareto_caption(rows: Rows, metric: Metric) -> str:
    """Say what the line of the figure joins; empty without a line."""
    front = pareto_rows(_with_value(rows, metric), metric)
    names = ", ".join(row["method"] for row in front)
    return f"No method is better with fewer trained parameters than those on the line: {names}." if front[1:] else ""


def _metric_figure(rows: Rows, metric: Metric, title: str, *, with_key: bool = False) -> tuple[Figure, bool]:
    """Return the figure, and whether each point could be named in it; else points are numbered."""
    key_height = KEY_LINE * len(rows) if with_key else 0.0

    def content(figure: Figure) -> None:
        if with_key:
            axes, key = figure.subplots(2, height_ratios=(PLOT_HEIGHT, key_height))
            _draw_key(key, rows, metric)
        else:
            axes = figure.add_subplot()
        _draw_points(axes, rows, metric)
        axes.set_title(_shorten(title, LONGEST_LINE), fontsize="medium")

    figure = draw(content, (WIDTH, PLOT_HEIGHT + key_height))
    return figure, _name_points(figure, rows, metric, numbers_only=with_key)


def _draw_points(axes: Axes, rows: Rows, metric: Metric) -> None:
    if rows:
        set_count_axis(axes, [_trained(row) for row in rows])
    for number, row in enumerate(rows):
        y, deviation = row["mean"][metric.name], row["std"].get(metric.name)
        axes.errorbar(_trained(row), y, yerr=deviation, fmt="o", capsize=3, color=_color(number), markersize=5)
    x, y = _steps(pareto_rows(rows, metric), metric)
    axes.plot(x, y, color=INK, alpha=0.45, linewidth=0.9, linestyle="--", zorder=1)
    axes.margins(y=0.12)
    axes.set_xlabel("trained parameters (tuned and head)")
    axes.set_ylabel(_wrapped(metric.heading("test")))
    axes.grid(visible=True)


def _steps(front: Rows, metric: Metric) -> tuple[list[float], list[float]]:
    """Return the corners of a line that is level from one row to the next, and then steps to its value."""
    x: list[float] = []
    y: list[float] = []
    for row in front:
        value = row["mean"][metric.name]
        x += [_trained(row)] * (2 if y else 1)
        y += [y[-1], value] if y else [value]
    return x, y


def _draw_key(axes: Axes, rows: Rows, metric: Metric) -> None:
    """List number, method and value of each point, over the whole width of the figure."""
    from matplotlib.transforms import blended_transform_factory

    axes.set_axis_off()
    axes.set_ylim(len(rows), 0)
    across_figure = blended_transform_factory(axes.figure.transFigure, axes.transData)
    style: dict[str, Any] = {"transform": across_figure, "in_layout": False}
    for number, row in enumerate(rows):
        y = number + 0.5
        axes.plot(0.025, y, "o", color=_color(number), markersize=5, clip_on=False, **style)
        axes.text(0.105, y, str(number + 1), ha="right", va="center", fontsize="small", **style)
        name = f"{_shorten(row['method'], LONGEST_LINE)}  {metric.number(row['mean'][metric.name])}"
        axes.text(0.125, y, name, va="center", fontsize="small", **style)


def _name_points(figure: Figure, rows: Rows, metric: Metric, *, numbers_only: bool) -> bool:
    import matplotlib

    from petune.runner.report.plots import STYLE

    with matplotlib.rc_context(STYLE):
        figure.draw_without_rendering()  # fixes the layout; in the style, which decides how many ticks there are
        figure.set_layout_engine("none")
        axes = figure.axes[0]
        values = [(row["mean"][metric.name], row["std"].get(metric.name, 0.0)) for row in rows]
        points = [Point(_trained(row), mean, std) for row, (mean, std) in zip(rows, values, strict=True)]
        corners = list(zip(*_steps(pareto_rows(rows, metric), metric), strict=True))
        if not numbers_only and label_points(axes, points, [matplotlib_text(row["method"]) for row in rows], corners):
            return True
        number_points(axes, points, corners)
    return False


def curve_charts(salt: str, curves: Sequence[Curve], metric: Metric, order: Sequence[str] = ()) -> list[Chart]:
    """Return a metric on val, and the loss on train (solid) and val (dashed), over epochs; nothing without curves.

    Args:
        salt: Keeps ids apart from those of the page's other figures.
        curves: One per run.
        metric: The metric that chooses the epoch.
        order: Labels of the section's other charts, so that colors agree.
    """
    if not curves:
        return []
    labels = list(dict.fromkeys([*order, *(curve.label for curve in curves)]))
    colors = {label: _color(number) for number, label in enumerate(labels)}
    used = {curve.label for curve in curves}
    key = [(color, label) for label, color in colors.items() if label in used]
    loss = _draw_curves(curves, colors, "loss", {"train_loss": "-", "val_loss": "--"})
    loss_chart = Chart(to_markup(loss, f"loss {salt}"), "Loss over epochs: train solid, validation dashed", key=key)
    if metric == LOSS:
        return [loss_chart]
    val = _draw_curves(curves, colors, metric.heading("val"), {f"val_{metric.name}": "-"})
    caption = f"{capitalized(metric.label)} on validation over epochs"
    return [Chart(to_markup(val, f"val {salt}"), caption, key=key), loss_chart]


def _draw_curves(curves: Sequence[Curve], colors: Mapping[str, str], unit: str, dashes: Mapping[str, str]) -> Figure:
    from matplotlib.ticker import MaxNLocator

    def content(figure: Figure) -> None:
        axes = figure.add_subplot()
        for curve in curves:
            for column, dash in dashes.items():
                values = [(row["epoch"], row[column]) for row in curve.epochs if column in row]
                marker = "o" if len(values) < 12 else ""
                x, y = [value[0] for value in values], [value[1] for value in values]
                axes.plot(x, y, dash, color=colors[curve.label], marker=marker, markersize=3, linewidth=1.3)
        axes.set_xlabel("epoch")
        axes.set_ylabel(_wrapped(unit))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(visible=True)

    return draw(content, (WIDTH, PLOT_HEIGHT))


def cost_charts(salt: str, rows: Rows) -> list[Chart]:
    """Return wall time and peak memory of each method, as bars."""
    seconds = [row["time_s"] / len(row["seeds"]) for row in rows]
    in_minutes = max(seconds, default=0) >= 120
    times = [time / 60 for time in seconds] if in_minutes else seconds
    gigabytes = [row["peak_memory_bytes"] / 1e9 for row in rows]
    names = [_shorten(row["method"], LONGEST_BAR) for row in rows]
    time_figure = _draw_bars(names, times, "minutes" if in_minutes else "seconds")
    memory_figure = _draw_bars(names, gigabytes, "GB")
    return [
        Chart(to_markup(time_figure, f"time {salt}"), "Wall time per run, mean over seeds"),
        Chart(to_markup(memory_figure, f"memory {salt}"), "Peak memory"),
    ]


def _draw_bars(names: Sequence[str], values: Sequence[float], unit: str) -> Figure:
    def content(figure: Figure) -> None:
        axes = figure.add_subplot()
        positions = range(len(names))
        bars = axes.barh(positions, values, height=0.62, color=[_color(number) for number in positions])
        axes.bar_label(bars, fmt="%.3g", padding=3, fontsize="small")
        axes.set_yticks(positions, names, fontsize="small")
        axes.invert_yaxis()
        axes.set_xlabel(unit)
        axes.margins(x=0.15)
        axes.grid(visible=True, axis="x")

    return draw(content, (WIDTH, 0.9 + 0.26 * len(names)))


def _with_value(rows: Rows, metric: Metric) -> Rows:
    return [row for row in rows if metric.name in row["mean"]]


def _trained(row: Mapping[str, Any]) -> int:
    return max(1, int(row["tuned"] + row["head"]))


def _color(number: int) -> str:
    return COLORS[number % len(COLORS)]


def _wrapped(label: str) -> str:
    return textwrap.fill(label, LONGEST_LABEL)


def _shorten(name: str, longest: int) -> str:
    """Cut a long name in the middle, because its end tells variants of a method apart."""
    text = matplotlib_text(name)
    half = longest // 2
    return text if len(text) <= longest else f"{text[: half - 1]}…{text[-half:]}"
