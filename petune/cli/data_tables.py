"""Print how many images each class has, as a histogram per split."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from petune.cli.terminal import print_status, print_table

if TYPE_CHECKING:
    from petune.data.check import DataReport

MAX_ROWS = 30
"""Classes that are printed; of more, the largest and the smallest. --json has all."""
BAR_WIDTH = 16
EIGHTHS = " ▏▎▍▌▋▊▉█"


def print_counts(report: DataReport) -> None:
    """Print a table of classes with a column and a bar for each split; a bar's full width is its split's largest class.

    Args:
        report: Of a dataset; numbers are counted by interval, masks by the classes in them.
    """
    splits = tuple(report.images)
    names = _shown_names(report.images[splits[0]])
    columns = [{"class": "class", "multi_hot": "label", "number": "interval", "mask": "class"}[report.kind]]
    bars = {part: " " * (i + 1) for i, part in enumerate(splits)}  # two columns cannot share a heading
    for part in splits:
        columns += [part, bars[part]]
    rows = []
    for name in names:
        row = [name]
        for part in splits:
            counts = report.images[part]
            row += [f"{counts[name]:,}", _bar(counts[name], max(counts.values()))]
        rows.append(row)
    print_table(columns, rows, right=splits, optional=list(bars.values()))
    hidden = len(report.images[splits[0]]) - len(names)
    if hidden:
        print_status(f"{hidden:,} classes between the largest and the smallest are not shown; --json has all")


def _shown_names(counts: dict[str, int]) -> list[str]:
    if len(counts) <= MAX_ROWS:
        return list(counts)
    ranked = sorted(counts, key=lambda name: -counts[name])
    chosen = {*ranked[: MAX_ROWS // 2], *ranked[-MAX_ROWS // 2 :]}
    return [name for name in ranked if name in chosen]


def _bar(count: int, largest: int) -> str:
    """Return a bar of blocks, or of `#` where the terminal cannot show them."""
    eighths = round(8 * BAR_WIDTH * count / max(largest, 1))
    if count:
        eighths = max(eighths, 1)
    full, rest = divmod(eighths, 8)
    bar = EIGHTHS[-1] * full + EIGHTHS[rest] * (rest > 0)
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    try:
        bar.encode(encoding)
    except UnicodeEncodeError:
        return "#" * max(full, count > 0)
    return bar
