"""How petune prints: data on stdout, talk on stderr, tables, numbers with units, names without control characters."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

PIPE_WIDTH = 200
"""Columns of a table that goes to a file or a pipe, where no terminal says how many there are."""


def clean(text: str) -> str:
    """`text` without control and bidirectional characters, which a file or class name may bring; lines stay."""
    lines = text.expandtabs(4).splitlines()
    return "\n".join("".join(c for c in line if c.isprintable()) for line in lines)


def say(text: str) -> None:
    """Print talk: on stderr."""
    print(text, file=sys.stderr, flush=True)


def show(text: str) -> None:
    """Print data: on stdout."""
    print(text, flush=True)


def show_json(value: Any) -> None:
    """Print data for scripts: one JSON object or list on stdout, ASCII only."""
    print(json.dumps(value, indent=1, default=str), flush=True)


def show_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Iterable[str] = ()) -> None:
    """Print a table on stdout.

    Args:
        columns: The headings.
        rows: Cells, one for every column.
        right: Headings of the columns that hold numbers.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    terminal = sys.stdout.isatty()
    console = Console(
        file=sys.stdout, markup=False, emoji=False, highlight=False, width=None if terminal else PIPE_WIDTH
    )
    table = Table(box=box.SIMPLE_HEAD if terminal else box.ASCII2, header_style="bold", pad_edge=False)
    numbers = set(right)
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(clean(cell) for cell in row))
    console.print(table)


def show_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Print names and values on stdout, a line each, the values below one another."""
    pairs = [(name, clean(value)) for name, value in facts]
    width = max(len(name) for name, _ in pairs)
    show("\n".join(f"{name.ljust(width)}  {value}" for name, value in pairs))


def count(number: int | None) -> str:
    """`1234567` → `1,234,567`; `-` for None."""
    return "-" if number is None else f"{number:,}"


def percent(value: float | None, digits: int = 2) -> str:
    """`12.3456` → `12.35 %`; `-` for None."""
    return "-" if value is None else f"{value:.{digits}f} %"


def flops(number: int) -> str:
    """`1254000000` → `1.254 GFLOPs`."""
    return f"{number / 1e9:.3f} GFLOPs"
