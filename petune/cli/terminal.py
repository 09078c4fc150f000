"""Print to the terminal: data on stdout, the rest on stderr, nothing with control characters."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from petune.base.distributed import is_main_process

PIPE_WIDTH = 1_000_000
"""Width of a table in a file or a pipe: wider than any table, so that nothing is hidden or wrapped there."""


def clean(text: str) -> str:
    """Return `text` without control and bidirectional characters; line breaks stay."""
    lines = text.expandtabs(4).splitlines()
    return "\n".join("".join(c for c in line if c.isprintable()) for line in lines)


def one_line(text: str) -> str:
    """Return `text` on one line, without control characters."""
    return " ".join(clean(text).split("\n"))


def print_status(text: str) -> None:
    """Print a message on stderr. With several processes only the main one prints."""
    if is_main_process():
        print(text, file=sys.stderr, flush=True)


def print_data(text: str) -> None:
    """Print data on stdout. With several processes only the main one prints."""
    if is_main_process():
        print(text, flush=True)


def print_json(value: Any) -> None:
    """Print one JSON object or list on stdout, ASCII only."""
    print_data(json.dumps(value, indent=1, default=str))


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    right: Collection[str] = (),
    optional: Sequence[str] = (),
) -> None:
    """Print a table on stdout. In a file or a pipe it has every column, and one line for each row.

    Args:
        columns: The headings.
        rows: Cells, one for every column.
        right: Headings of the right-aligned columns, those that hold numbers.
        optional: Headings of the columns to hide, in this order, until the table fits the terminal.
    """
    if not is_main_process():
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    terminal = sys.stdout.isatty()
    width = None if terminal else PIPE_WIDTH
    plain = clean if terminal else one_line
    console = Console(file=sys.stdout, markup=False, emoji=False, highlight=False, width=width)
    cells = [[plain(cell) for cell in row] for row in rows]
    visible = _visible_columns(columns, cells, optional, console.width)
    table = Table(box=box.SIMPLE_HEAD if terminal else box.MARKDOWN, header_style="bold")
    for index in visible:
        table.add_column(columns[index], justify="right" if columns[index] in right else "left", overflow="fold")
    for row in cells:
        table.add_row(*(row[index] for index in visible))
    with console.capture() as captured:
        console.print(table)
    print_data("\n".join(line.rstrip() for line in captured.get().splitlines() if line.strip()))
    hidden = [heading for index, heading in enumerate(columns) if index not in visible]
    if hidden:
        print_status(f"hidden (terminal too narrow): {', '.join(hidden)}")


def _visible_columns(
    columns: Sequence[str], cells: Sequence[Sequence[str]], optional: Sequence[str], width: int
) -> list[int]:
    widths = [3 + max(len(row[i]) for row in (columns, *cells)) for i in range(len(columns))]
    visible = list(range(len(columns)))
    for heading in optional:
        if sum(widths[i] for i in visible) + 1 <= width:
            break
        visible.remove(columns.index(heading))
    return visible


def print_facts(facts: Iterable[tuple[str, str]], *, to_stderr: bool = False) -> None:
    """Print names and values in two aligned columns, on stdout or on stderr."""
    pairs = [(name, clean(value)) for name, value in facts]
    width = max(len(name) for name, _ in pairs)
    text = "\n".join(f"{name.ljust(width)}  {value}" for name, value in pairs)
    if to_stderr:
        print_status(text)
    else:
        print_data(text)


def format_count(number: int | None) -> str:
    """Format `1234567` as `1,234,567`, and None as `-`."""
    return "-" if number is None else f"{number:,}"


def format_flops(number: int) -> str:
    """Format `1254000000` as `1.254 GFLOPs`."""
    return f"{number / 1e9:.3f} GFLOPs" if number >= 1e9 else f"{number / 1e6:.3f} MFLOPs"
