"""Figures: plain numbers at the axes, labels that neither overlap nor leave the figure, light and dark."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from petune.base.metric import Metric
from petune.runner.migrations import updated_comparison
from petune.runner.report.charts import cost_charts, metric_chart, metric_file, pareto_caption, pareto_rows
from petune.runner.report.labels import Point, label_points, number_points
from petune.runner.report.plots import count_ticks, draw, set_count_axis, short_number, to_file

TOP1 = Metric(name="top1", label="top-1", percent=True)
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def _rows(*methods: tuple[str, int, float]) -> list[dict[str, Any]]:
    measured = {"head": 10, "std": {}, "seeds": [0], "time_s": 3.0, "peak_memory_bytes": 10**9}
    return [{"method": name, "tuned": tuned, "mean": {"top1": top1}, **measured} for name, tuned, top1 in methods]


def _texts(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


@pytest.mark.parametrize(
    ("number", "text"), [(999, "999"), (10_000, "10k"), (2_500_000, "2.5M"), (86e6, "86M"), (1.1e9, "1.1G")]
)
def test_numbers_are_short(number: float, text: str) -> None:
    assert short_number(number) == text


@pytest.mark.parametrize(
    ("low", "high"),
    [(1e3, 1e7), (1200, 4e6), (1e3, 1e12), (9e3, 1.1e5), (150_000, 300_000), (40_000, 41_000), (7, 11), (1, 3)],
)
def test_ticks_are_few_and_inside(low: float, high: float) -> None:
    ticks = count_ticks(low, high)
    assert 2 <= len(ticks) <= 6
    assert all(low <= tick <= high for tick in ticks)
    assert len({short_number(tick) for tick in ticks}) == len(ticks)


@pytest.mark.parametrize("sizes", [(100, 10**6), (150_922, 150_928), (150_922, 150_922)])
def test_an_axis_of_sizes_has_plain_labels(sizes: tuple[int, int]) -> None:
    rows = _rows(("a", sizes[0], 80.0), ("b", sizes[1], 81.0))
    svg = metric_file(rows, TOP1, "t").decode()
    assert "mathdefault" not in svg
    labels = [text for text in _texts(svg) if re.fullmatch(r"[\d.]+[kMG]?", text)]
    assert any(label[-1] in "kM" for label in labels)


def test_the_file_is_light_or_dark_and_the_same_every_time() -> None:
    rows = _rows(("linear", 0, 70.0), ("vpt", 5000, 75.0))
    svg = metric_file(rows, TOP1, "vit on pets")
    assert svg == metric_file(rows, TOP1, "vit on pets")
    assert b"prefers-color-scheme: dark" in svg
    assert b"currentColor" in svg
    assert {"linear", "vpt", "vit on pets"} <= set(_texts(svg.decode()))


def test_names_cannot_become_formulas_or_markup() -> None:
    svg = metric_chart("salt", _rows(("$x^2$ <b>", 100, 50.0)), TOP1).svg
    assert "$x^2$ &lt;b&gt;" in svg
    assert all("$x^2$ &lt;b&gt;" in chart.svg for chart in cost_charts("salt", _rows(("$x^2$ <b>", 100, 50.0))))


def test_the_line_joins_what_no_smaller_method_beats() -> None:
    rows = _rows(("full", 9000, 79.0), ("linear", 0, 70.0), ("vpt", 50, 70.0), ("lora", 500, 80.0), ("ssf", 500, 75.0))
    assert [row["method"] for row in pareto_rows(rows, TOP1)] == ["linear", "lora"]
    assert [row["method"] for row in pareto_rows(rows, TOP1.model_copy(update={"higher_is_better": False}))] == [
        "linear"
    ]
    assert pareto_caption(rows, TOP1).endswith("those on the line: linear, lora.")
    assert pareto_caption(rows[:1], TOP1) == ""


def test_methods_at_the_same_point_share_a_number() -> None:
    figure = draw(lambda figure: figure.add_subplot().set_ylim(40, 70), (4.4, 3.4))
    axes = figure.axes[0]
    axes.set_xlim(0, 8)
    number_points(axes, [*[Point(2, 50.0)] * 5, Point(6, 60.0)])
    assert [text.get_text() for text in axes.texts] == ["1, 2, 3, 4, 5", "6"]


def test_the_heading_of_the_axis_is_inside_the_file() -> None:
    """The ticks of the file are those of its layout, also where their labels grow by a digit."""
    rows = _rows(
        ("linear", 0, 71.0), ("lora:r=4", 90_000, 80.0), ("lora:r=8", 180_000, 80.3), ("full", 3_000_000, 80.1)
    )
    for row, deviation in zip(rows, (0.5, 0.5, 0.3, 4.0), strict=True):
        row["std"] = {"top1": deviation}
    svg = metric_file(rows, TOP1, "t").decode()
    found = re.search(r'x="([\d.-]+)"[^>]*>top-1 on test, percent', svg)
    assert found
    assert float(found[1]) > 9


@pytest.mark.exhaustive
def test_many_methods_are_numbered_and_listed() -> None:
    rows = updated_comparison(json.loads((RESULTS / "cifar-small" / "compare.json").read_text()))["rows"]
    texts = _texts(metric_file(rows, TOP1, "t").decode())
    for number, row in enumerate(rows):
        assert texts.count(str(number + 1)) >= 2  # at the point and in the list
        assert f"{row['method']}  {row['mean']['top1']:.2f}" in texts
    chart = metric_chart("salt", rows, TOP1)
    assert [name for _, name in chart.key] == [f"{number + 1}  {row['method']}" for number, row in enumerate(rows)]


@pytest.mark.parametrize("comparison", sorted(path.parent.name for path in RESULTS.glob("*/compare.json")))
def test_labels_neither_overlap_nor_leave_the_axes(comparison: str) -> None:
    rows = updated_comparison(json.loads((RESULTS / comparison / "compare.json").read_text()))["rows"]
    points = [Point(row["tuned"] + row["head"], row["mean"]["top1"], 0.0) for row in rows]

    def content(figure: Any) -> None:
        axes = figure.add_subplot()
        set_count_axis(axes, [int(point.x) for point in points])
        axes.errorbar([p.x for p in points], [p.y for p in points], yerr=[p.deviation for p in points], fmt="o")
        axes.margins(y=0.12)

    figure = draw(content, (4.4, 3.4))
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    axes = figure.axes[0]
    assert label_points(axes, points, [str(number + 1) for number in range(len(points))])
    figure.draw_without_rendering()
    labels = [text for text in axes.texts if text.get_text()]
    assert len(labels) == len(points)
    plain = [axes.text(0, 0, label.get_text(), fontsize=label.get_fontsize()) for label in labels]
    boxes = []
    for label, text in zip(labels, plain, strict=True):  # a copy without the line to the point
        text.set_position(label.get_transform().transform(label.get_position()))
        text.set_transform(None)
        text.set_ha(label.get_ha())
        text.set_va(label.get_va())
        boxes.append(text.get_window_extent())
    inside = axes.get_window_extent().padded(1.0)
    assert all(inside.x0 <= box.x0 and box.x1 <= inside.x1 for box in boxes)
    assert all(inside.y0 <= box.y0 and box.y1 <= inside.y1 for box in boxes)
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))


def test_a_png_is_a_png() -> None:
    figure = draw(lambda figure: None, (1, 1))
    assert to_file(figure, "png").startswith(b"\x89PNG")
