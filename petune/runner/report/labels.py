"""Labels for the points of a scatter plot that cover no point and no other label, and stay inside the axes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from petune.runner.report.plots import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

MARK_PT = 4.0
"""Half the side of the square around a point that labels keep free."""
SAME_PLACE_PT = 1.5
"""Points with their centers nearer to each other than this look like one."""
DISTANCES_PT = (7.0, 12.0, 18.0, 26.0, 36.0, 48.0)
"""From a point to the nearest edge of its label."""
LEADER_FROM_PT = 15.0
"""Labels at this distance or more get a line to their point."""
CLEARER = 2.5
"""Minimum ratio of the distances to the nearest other mark and to the own mark, for a label without a line."""
ANGLES = (20, -20, 160, -160, 90, -90, 50, -50, 130, -130, 0, 180)
"""Directions from a point to its label in degrees, the most usual first."""


@dataclass(frozen=True)
class Point:
    """A point with the bar of its standard deviation, in data coordinates."""

    x: float
    y: float
    deviation: float = 0.0


Corners = Sequence[tuple[float, float]]
"""Of a line that is level or upright from each to the next, in data coordinates."""


def label_points(axes: Axes, points: Sequence[Point], labels: Sequence[str], line: Corners = ()) -> bool:
    """Write a label at each point.

    Args:
        axes: With its final limits and size.
        points: Where the labels belong.
        labels: One per point.
        line: A line that the labels cover only if there is no other way.

    Returns:
        False if a label has no room; no label is then written.
    """
    numbers = range(len(points))
    longest_first = sorted(numbers, key=lambda number: -len(labels[number]))
    segments = _segments(axes, line)
    return any(_label_in_order(axes, points, labels, order, segments) for order in (numbers, longest_first))


def number_points(axes: Axes, points: Sequence[Point], line: Corners = ()) -> None:
    """Write the number of each point, from 1; points at the same place share a label, and those without room get none.

    Args:
        axes, points, line: See `label_points`.
    """
    numbers: dict[Point, list[str]] = {}
    for number, point in enumerate(points):
        numbers.setdefault(_first_nearby(axes, point, numbers), []).append(str(number + 1))
    apart, labels = list(numbers), [", ".join(shared) for shared in numbers.values()]
    if label_points(axes, apart, labels, line):
        return
    marks = [_mark(axes, point) for point in apart]
    boxes: list[Bbox] = []
    for i, (point, label) in enumerate(zip(apart, labels, strict=True)):
        annotation = _place(axes, point, label, marks[i], marks[:i] + marks[i + 1 :], boxes)
        boxes += [_extent(axes, annotation)] if annotation is not None else []


def _first_nearby(axes: Axes, point: Point, others: Iterable[Point]) -> Point:
    """Return the first of other points that is drawn on the same place, or the point itself."""
    for other in others:
        (x, y), (other_x, other_y) = axes.transData.transform([(point.x, point.y), (other.x, other.y)]).tolist()
        if math.hypot(x - other_x, y - other_y) < SAME_PLACE_PT * axes.figure.dpi / 72:
            return other
    return point


def _label_in_order(
    axes: Axes, points: Sequence[Point], labels: Sequence[str], order: Iterable[int], line: Sequence[Bbox]
) -> bool:
    """Place one label after the other; remove all of them if one has no room."""
    marks = [_mark(axes, point) for point in points]
    written: list[Annotation] = []
    boxes: list[Bbox] = []
    for number in order:
        others = marks[:number] + marks[number + 1 :]
        annotation = _place(axes, points[number], labels[number], marks[number], others, boxes, line)
        if annotation is None:
            for other in written:
                other.remove()
            return False
        written.append(annotation)
        boxes.append(_extent(axes, annotation))
    return True


def _place(
    axes: Axes,
    point: Point,
    label: str,
    mark: Bbox,
    others: Sequence[Bbox],
    boxes: Sequence[Bbox],
    line: Sequence[Bbox] = (),
) -> Annotation | None:
    """Write a label at the first free position, clearly nearer to its own mark than to others, or with a line to it.

    It covers the segments of `line` only if it has no place else.
    """
    inside = axes.get_window_extent()
    ways = [(offset, avoided) for avoided in ([line, ()] if line else [()]) for offset in _offsets()]
    for offset, avoided in ways:
        annotation = _annotate(axes, point, label, offset)
        box = _extent(axes, annotation)
        fits = inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
        free = not any(box.overlaps(other) for other in (mark, *others, *boxes, *avoided))
        if annotation.arrow_patch is None:
            clear = all(_gap(box, other) >= CLEARER * _gap(box, mark) for other in others)
        else:
            clear = not any(_crosses(annotation, other) for other in (*others, *boxes))
        if fits and free and clear:
            return annotation
        annotation.remove()
    return None


def _crosses(annotation: Annotation, box: Bbox) -> bool:
    """Return whether the line of a label goes through a box."""
    assert annotation.arrow_patch is not None
    line = annotation.arrow_patch
    (x0, y0), *_, (x1, y1) = line.get_transform().transform(line.get_path().vertices).tolist()
    shares = [step / 20 for step in range(1, 20)]
    return any(box.contains(x0 + (x1 - x0) * share, y0 + (y1 - y0) * share) for share in shares)


def _gap(a: Bbox, b: Bbox) -> float:
    """Return the distance between two boxes."""
    across = max(a.x0 - b.x1, b.x0 - a.x1, 0.0)
    up = max(a.y0 - b.y1, b.y0 - a.y1, 0.0)
    return math.hypot(across, up)


def _offsets() -> Iterator[tuple[float, float]]:
    for distance in DISTANCES_PT:
        for angle in ANGLES:
            yield distance * math.cos(math.radians(angle)), distance * math.sin(math.radians(angle))


def _annotate(axes: Axes, point: Point, label: str, offset: tuple[float, float]) -> Annotation:
    across, up = offset
    distance = math.hypot(across, up)
    leader = {"arrowstyle": "-", "color": INK, "linewidth": 0.6, "alpha": 0.6, "shrinkA": 0, "shrinkB": 3}
    return axes.annotate(
        label,
        (point.x, point.y),
        xytext=offset,
        textcoords="offset points",
        ha="center" if abs(across) < 1 else "left" if across > 0 else "right",
        va="center" if abs(up) < distance / 2 else "bottom" if up > 0 else "top",
        fontsize="small",
        arrowprops=leader if distance >= LEADER_FROM_PT else None,
    )


def _extent(axes: Axes, annotation: Annotation) -> Bbox:
    """Return the box of a label's text, without its line, in pixels."""
    from matplotlib.text import Text

    canvas: Any = axes.figure.canvas  # of Agg, which can measure text
    annotation.update_positions(canvas.get_renderer())
    return Text.get_window_extent(annotation).padded(1.0)


def _segments(axes: Axes, line: Corners) -> list[Bbox]:
    """Return the boxes of the pieces of a line, in pixels."""
    from matplotlib.transforms import Bbox

    if not line:
        return []
    corners = axes.transData.transform(line).tolist()
    pairs = itertools.pairwise(corners)
    return [Bbox.from_extents(min(a, c), min(b, d), max(a, c), max(b, d)).padded(1.0) for (a, b), (c, d) in pairs]


def _mark(axes: Axes, point: Point) -> Bbox:
    """Return the box of a point and its bar, in pixels."""
    from matplotlib.transforms import Bbox

    ends = [(point.x, point.y - point.deviation), (point.x, point.y + point.deviation)]
    (x, bottom), (_, top) = axes.transData.transform(ends).tolist()
    middle = (bottom + top) / 2
    side = MARK_PT * axes.figure.dpi / 72
    return Bbox.from_extents(x - side, min(bottom, middle - side), x + side, max(top, middle + side))
