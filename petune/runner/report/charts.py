"""Charts as inline SVG: text stays text, colours follow the page, names cannot become markup or formulas."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from petune.base.text import matplotlib_text

INK = "#010203"
"""Drawn with this colour, shown in the page's own: light on dark, dark on light."""
COLOURS = ("#3b82d6", "#e07b39", "#3aa66b", "#d1495b", "#8e6bbf", "#a0764f", "#d972b0", "#7f8c8d", "#a8a033", "#2ba8b0")
STYLE = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 9.0, "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK, "grid.color": INK, "axes.spines.top": False,
    "axes.spines.right": False,
}  # fmt: skip
SMALL = (4.4, 3.1)
"""Inches: at the width of a phone its letters are as large as the page's small ones."""


@dataclass(frozen=True)
class Chart:
    """An image with its caption.

    Attributes:
        svg: Markup that is safe to put into the page.
        caption: What it shows.
        key: Colour and name of each line, where names do not stand in the image.
    """

    svg: Markup
    caption: str
    key: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Curve:
    """The epochs of one run; runs of one label share a colour."""

    label: str
    epochs: Sequence[Mapping[str, float]]


def accuracy_chart(salt: str, rows: Sequence[Mapping[str, Any]]) -> Chart:
    """Top-1 on test over trained parameters, the latter on a log axis; a bar spans a standard deviation each way."""
    with _style():
        figure, axes = _figure(SMALL)
        trained = [row["tuned"] + row["head"] for row in rows]
        for number, (x, row) in enumerate(zip(trained, rows, strict=True)):
            colour = COLOURS[number % len(COLOURS)]
            axes.errorbar(x, row["top1_mean"], yerr=row["top1_std"], fmt="o", capsize=3, color=colour, markersize=5)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, place: _short(value))
        axes.xaxis.set_minor_formatter(lambda value, place: "")
        axes.margins(0.15, 0.12)
        axes.set_xlabel("trained parameters (tuned and head)")
        axes.set_ylabel("top-1 on test, percent")
        points = [(x, row["top1_mean"], matplotlib_text(row["method"])) for x, row in zip(trained, rows, strict=True)]
        _label_points(figure, axes, points)
        return Chart(_svg(figure, f"accuracy {salt}"), "Top-1 on test over trained parameters")


def curve_charts(salt: str, curves: Sequence[Curve], order: Sequence[str] = ()) -> list[Chart]:
    """Top-1 on val, and loss on train (whole lines) and val (dashed), over epochs; none without curves.

    Args:
        salt: Keeps the charts' ids apart from those of others.
        curves: One a run.
        order: Labels that the other charts of the section have, so that colours agree.
    """
    if not curves:
        return []
    labels = list(dict.fromkeys([*order, *(curve.label for curve in curves)]))
    colours = {label: COLOURS[number % len(COLOURS)] for number, label in enumerate(labels)}
    drawn = {curve.label for curve in curves}
    key = [(colour, label) for label, colour in colours.items() if label in drawn]
    wanted = [
        ("Top-1 on validation over epochs", "percent", [("val_top1", "-")]),
        ("Loss over epochs: train whole, validation dashed", "loss", [("train_loss", "-"), ("val_loss", "--")]),
    ]
    return [Chart(_curves(salt, curves, colours, unit, lines), text, key) for text, unit, lines in wanted]


def cost_charts(salt: str, rows: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Wall time and peak memory as bars."""
    seconds = [row["time_s"] / len(row["seeds"]) for row in rows]
    slow = max(seconds, default=0) >= 120
    times, unit = [time / (60 if slow else 1) for time in seconds], "minutes" if slow else "seconds"
    gigabytes = [row["peak_memory_bytes"] / 1e9 for row in rows]
    names = [matplotlib_text(row["method"]) for row in rows]
    return [
        Chart(_bars(f"time {salt}", names, times, unit), "Wall time of a run, mean over seeds"),
        Chart(_bars(f"memory {salt}", names, gigabytes, "GB"), "Peak memory"),
    ]


def _curves(
    salt: str,
    curves: Sequence[Curve],
    colours: Mapping[str, str],
    unit: str,
    lines: Sequence[tuple[str, str]],
) -> Markup:
    from matplotlib.ticker import MaxNLocator

    with _style():
        figure, axes = _figure(SMALL)
        for curve in curves:
            for column, dash in lines:
                points = [(row["epoch"], row[column]) for row in curve.epochs if column in row]
                if points:
                    mark = "o" if len(points) < 12 else None
                    x, y = zip(*points, strict=True)
                    axes.plot(x, y, dash, color=colours[curve.label], marker=mark, markersize=3, linewidth=1.3)
        axes.set_xlabel("epoch")
        axes.set_ylabel(unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        return _svg(figure, f"{unit} {salt}")


def _bars(salt: str, names: Sequence[str], values: Sequence[float], unit: str) -> Markup:
    with _style():
        figure, axes = _figure((SMALL[0], 0.9 + 0.26 * len(names)))
        places = range(len(names))
        bars = axes.barh(places, values, height=0.62, color=[COLOURS[i % len(COLOURS)] for i in places])
        axes.bar_label(bars, fmt="%.3g", padding=3)
        axes.set_yticks(places, [name if len(name) < 30 else name[:28] + "…" for name in names])
        axes.invert_yaxis()
        axes.set_xlabel(unit)
        axes.margins(x=0.15)
        axes.grid(visible=False, axis="y")
        return _svg(figure, salt)


def _label_points(figure: Any, axes: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """A name beside each point, at the first place where it covers no other name and no point."""
    from matplotlib.transforms import Bbox

    renderer = figure.canvas.get_renderer()
    figure.draw_without_rendering()
    inside = axes.get_window_extent(renderer)
    marks = axes.transData.transform([point[:2] for point in points])
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in marks]
    beside = [(6, 4, "left"), (6, -11, "left"), (-6, 4, "right"), (-6, -11, "right"), (0, 9, "center"),
              (0, -17, "center"), (6, 15, "left"), (-6, 15, "right"), (6, -22, "left"), (-6, -22, "right")]  # fmt: skip
    for x, y, name in points:
        for dx, dy, side in beside:
            text = axes.annotate(name, (x, y), xytext=(dx, dy), textcoords="offset points", ha=side, fontsize=8)
            box = text.get_window_extent(renderer)
            whole = inside.x0 <= box.x0 and box.x1 <= inside.x1
            if whole and not any(box.overlaps(other) for other in taken):
                break
            text.remove()
        else:  # crowded: then above, and over whatever is there
            text = axes.annotate(name, (x, y), xytext=(6, 4), textcoords="offset points", fontsize=8)
        taken.append(text.get_window_extent(renderer))


def _style() -> Any:
    import matplotlib

    return matplotlib.rc_context(STYLE)


def _figure(inches: tuple[float, float]) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=inches, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(alpha=0.2)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Any, salt: str) -> Markup:
    """The figure without what belongs to a file alone; a salt of its own keeps its ids apart from other charts'."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r' id="[\w.]+_\d+"', "", text)
    text = re.sub(
        r'^<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 role="img" xmlns:xlink="http://www.w3.org/1999/xlink">', text
    )
    return Markup(text.replace(INK, "currentColor"))


def _short(number: float) -> str:
    """`10k` for ten thousand."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:g}{unit}"
    return f"{number:g}"
