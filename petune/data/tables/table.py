"""The form in which rows of images and targets are read, whatever file they come from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from numpy.typing import NDArray

from petune.base.errors import DataError, similar_names

Content = Path | bytes | NDArray[Any]
"""An image: its file, the bytes of a file, or pixels of shape (H, W) or (H, W, C)."""
ValueKind = Literal["text", "integer", "float", "boolean", "list", "image", "other"]
MAX_COLUMNS = 20


@dataclass(frozen=True)
class ColumnType:
    """Type of a column.

    Attributes:
        kind: `image` are bytes and arrays, which need no file; `list` are lists of text or numbers.
        names: Class names, if the file names the classes that its integers count; else None.
        is_declared: False for the columns of a CSV file, which are all text.
    """

    kind: ValueKind
    names: tuple[str, ...] | None = None
    is_declared: bool = True


class Table(Protocol):
    """Rows of samples."""

    @property
    def title(self) -> str:
        """The file or dataset, for messages."""

    @property
    def folder(self) -> Path:
        """The folder that paths of images are relative to."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns, in order."""

    def __len__(self) -> int:
        """Return the number of rows."""

    def type_of(self, column: str) -> ColumnType:
        """Return the type of a column."""

    def values(self, column: str) -> list[Any]:
        """Return the values of a column; None where there is none."""

    def contents(self, column: str) -> Iterator[list[Any]]:
        """Yield the values of a column of images in parts, so that not all are in memory; paths are text."""

    def row_name(self, row: int) -> str:
        """Return the place of a row for messages: `line 7`, counted as in an editor."""

    def keys(self) -> Sequence[str] | None:
        """Return a name for each row where images are not files; None if rows only have a number."""

    def version(self) -> Any:
        """Return JSON that changes with the file, such as its size and time."""

    def digest(self) -> str:
        """Return a digest of the contents, equal for a copy of the file."""


def check_column(table: Table, column: str, option: str) -> str:
    """Return the name of a column.

    Args:
        table: The rows.
        column: The name as given.
        option: The option that names it, for the message.

    Raises:
        DataError: There is no such column; the message names similar ones.
    """
    if column in table.columns:
        return column
    similar = similar_names(column, table.columns)
    advice = f"Did you mean {' or '.join(similar)}?" if similar else f"Columns: {listed(table.columns)}"
    raise DataError(f"{table.title} has no column {column!r} for {option}. {advice}")


def listed(names: Sequence[str], most: int = MAX_COLUMNS) -> str:
    """Return the first names, separated by commas."""
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def first_rows(table: Table, rows: Sequence[int], most: int = 3) -> str:
    """Return `line 3, line 7 and 12 more`."""
    return listed([table.row_name(row) for row in rows], most)
