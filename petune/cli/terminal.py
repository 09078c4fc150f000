"""How petune prints: data on stdout, talk on stderr, tables, units, names without control characters."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from petune.base.distributed import leads

PIPE_WIDTH = 200
"""Columns of a table that goes to a file or a pipe, where no terminal says how many there are."""


def clean(text: str) -> str:
    """`text` without control and bidirectional characters, which names may bring; lines stay."""
    lines = text.expandtabs(4).splitlines()
    return "\n".join("".join(c for c in line if c.isprintable()) for line in lines)


def one_line(text: str) -> str:
    """`text` without control characters, on one line: a name among others."""
    return " ".join(clean(text).split("\n"))


def say(text: str) -> None:
    """Print talk: on stderr. Of several processes that do one run, the leader alone prints."""
    if leads():
        print(text, file=sys.stderr, flush=True)


def show(text: str) -> None:
    """Print data: on stdout."""
    if leads():
        print(text, flush=True)


def show_json(value: Any) -> None:
    """Print data for scripts: one JSON object or list on stdout, ASCII only."""
    if leads():
        print(json.dumps(value, indent=1, default=str), flush=True)


def show_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    right: Collection[str] = (),
    spare: Sequence[str] = (),
) -> None:
    """Print a table on stdout.

    Args:
        columns: The headings.
        rows: Cells, one for every column.
        right: Headings of the columns that hold numbers.
        spare: Headings of the columns to leave out, in this order, until the table fits a narrow terminal.
    """
    if not leads():
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    terminal = sys.stdout.isatty()
    width = None if terminal else PIPE_WIDTH
    console = Console(file=sys.stdout, markup=False, emoji=False, highlight=False, width=width)
    cells = [[clean(cell) for cell in row] for row in rows]
    kept = _fitting(columns, cells, spare, console.width)
    table = Table(box=box.SIMPLE_HEAD if terminal else box.MARKDOWN, header_style="bold")
    for index in kept:
        table.add_column(columns[index], justify="right" if columns[index] in right else "left", overflow="fold")
    for row in cells:
        table.add_row(*(row[index] for index in kept))
    with console.capture() as captured:
        console.print(table)
    show("\n".join(line.rstrip() for line in captured.get().splitlines() if line.strip()))
    if len(kept) < len(columns):
        say(f"left out for want of width: {', '.join(c for i, c in enumerate(columns) if i not in kept)}")


def _fitting(columns: Sequence[str], cells: Sequence[Sequence[str]], spare: Sequence[str], width: int) -> list[int]:
    widths = [3 + max(len(row[i]) for row in (columns, *cells)) for i in range(len(columns))]
    kept = list(range(len(columns)))
    for heading in spare:
        if sum(widths[i] for i in kept) + 1 <= width:
            break
        kept.remove(columns.index(heading))
    return kept


def show_facts(facts: Iterable[tuple[str, str]], *, talk: bool = False) -> None:
    """Print names and values, a line each, the values below one another; on stdout, or on stderr as talk."""
    pairs = [(name, clean(value)) for name, value in facts]
    width = max(len(name) for name, _ in pairs)
    (say if talk else show)("\n".join(f"{name.ljust(width)}  {value}" for name, value in pairs))


def count(number: int | None) -> str:
    """`1234567` → `1,234,567`; `-` for None."""
    return "-" if number is None else f"{number:,}"


def flops(number: int) -> str:
    """`1254000000` → `1.254 GFLOPs`."""
    return f"{number / 1e9:.3f} GFLOPs" if number >= 1e9 else f"{number / 1e6:.3f} MFLOPs"
