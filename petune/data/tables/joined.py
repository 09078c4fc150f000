"""Join the tables of several splits into one, with a column that says which split a row is in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from petune.base.errors import DataError
from petune.data.manifest import digest
from petune.data.tables.table import ColumnType, Table

SPLIT = "split"


@dataclass(frozen=True)
class JoinedTable:
    """The rows of several splits, in order; see `Table`.

    Attributes:
        title: See `Table`.
        parts: The table of each split.
    """

    title: str
    parts: Mapping[str, Table]

    @property
    def folder(self) -> Path:
        """The folder of the first table."""
        return self._first.folder

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the first table, and the split."""
        return (*(column for column in self._first.columns if column != SPLIT), SPLIT)

    def __len__(self) -> int:
        return sum(len(table) for table in self.parts.values())

    def type_of(self, column: str) -> ColumnType:
        """Return the type of a column.

        Raises:
            DataError: The splits have different types or classes of it.
        """
        if column == SPLIT:
            return ColumnType("text")
        types = {part: table.type_of(self._check(part, column)) for part, table in self.parts.items()}
        first = next(iter(types))
        different = next((part for part, column_type in types.items() if column_type != types[first]), None)
        if different is not None:
            raise DataError(
                f"{self.title}: the column {column} has other types or classes in {different} than in {first}. Choose "
                "other columns, or write the splits alike"
            )
        return types[first]

    def values(self, column: str) -> list[Any]:
        """Return the values of a column."""
        if column == SPLIT:
            return [part for part, table in self.parts.items() for _ in range(len(table))]
        return [value for part, table in self.parts.items() for value in table.values(self._check(part, column))]

    def contents(self, column: str) -> Iterator[list[Any]]:
        """Yield the images of all splits."""
        for part, table in self.parts.items():
            yield from table.contents(self._check(part, column))

    def row_name(self, row: int) -> str:
        """Return the split and the place in it."""
        for part, table in self.parts.items():
            if row < len(table):
                return f"{part}, {table.row_name(row)}"
            row -= len(table)
        raise IndexError(row)

    def keys(self) -> Sequence[str] | None:
        """Return the split and the number of each row."""
        return [f"{part}/{row}" for part, table in self.parts.items() for row in np.arange(len(table)).tolist()]

    def version(self) -> Any:
        """Return the versions of all splits."""
        return {part: table.version() for part, table in self.parts.items()}

    def digest(self) -> str:
        """Return a digest of all splits."""
        return digest([[part, table.digest()] for part, table in self.parts.items()])

    @property
    def _first(self) -> Table:
        return next(iter(self.parts.values()))

    def _check(self, part: str, column: str) -> str:
        table = self.parts[part]
        if column not in table.columns:
            raise DataError(f"{self.title}: the split {part} has no column {column}, but others have")
        return column
