"""Read CSV, TSV and JSON lines: nothing is guessed, so "NA", "None" and "01" stay what they are."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petune.base.errors import DataError
from petune.data.cache import file_key
from petune.data.images import supported_suffixes
from petune.data.manifest import file_digest
from petune.data.tables.table import ColumnType, ValueKind

PART = 256
MAX_CELL = 2**31 - 1


@dataclass(frozen=True)
class TextTable:
    """A table in memory; see `Table`.

    Attributes:
        path: The file.
        folder: See `Table`.
        data: Values by column.
        lines: The line of each row in the file, from 1.
        types: Types by column.
    """

    path: Path
    folder: Path
    data: dict[str, list[Any]]
    lines: list[int]
    types: dict[str, ColumnType]

    @property
    def title(self) -> str:
        """The file."""
        return str(self.path)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns."""
        return tuple(self.data)

    def __len__(self) -> int:
        return len(self.lines)

    def type_of(self, column: str) -> ColumnType:
        """Return the type of a column: text in a CSV file."""
        return self.types[column]

    def values(self, column: str) -> list[Any]:
        """Return the values of a column."""
        return self.data[column]

    def contents(self, column: str) -> Iterator[list[Any]]:
        """Yield paths or nested lists."""
        values = self.data[column]
        for start in range(0, len(values), PART):
            yield values[start : start + PART]

    def row_name(self, row: int) -> str:
        """Return the line of a row."""
        return f"line {self.lines[row]:,}"

    def keys(self) -> Sequence[str] | None:
        """Return None: rows have no names."""
        return None

    def version(self) -> Any:
        """Return path, size and time of the file."""
        return file_key(self.path)

    def digest(self) -> str:
        """Return a digest of the file."""
        return file_digest(self.path)


def read_delimited(path: Path, folder: Path) -> TextTable:
    """Read a CSV or TSV file; every cell is text.

    Args:
        path: The file. A file called .csv may be separated by semicolons, as spreadsheets in many countries write it.
        folder: See `Table`.

    Raises:
        DataError: It is not UTF-8, has no header line, or a line has another number of cells.
    """
    csv.field_size_limit(MAX_CELL)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            head = file.readline()
            file.seek(0)
            reader = csv.reader(file, delimiter=_delimiter(path, head), strict=True)
            header = next(reader, [])
            _check_header(path, header)
            rows, lines = [], []
            for cells in reader:
                if not cells:  # an empty line
                    continue
                if len(cells) != len(header):
                    raise DataError(
                        f"{path}, line {reader.line_num:,} has {len(cells)} cells, but the header names "
                        f"{len(header)} columns. Put text with commas into quotes"
                    )
                rows.append(cells)
                lines.append(reader.line_num)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise _unreadable(path, error) from None
    data = {name: [cells[i] for cells in rows] for i, name in enumerate(header)}
    return TextTable(path, folder, data, lines, {name: ColumnType("text", is_declared=False) for name in header})


def read_json_lines(path: Path, folder: Path) -> TextTable:
    """Read a file with a JSON object a line; a key that a line leaves out is missing there.

    Raises:
        DataError: A line is not a JSON object.
    """
    rows, lines = [], []
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    rows.append(_json_object(path, number, line))
                    lines.append(number)
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from None
    names = dict.fromkeys(key for row in rows for key in row)
    data = {name: [row.get(name) for row in rows] for name in names}
    return TextTable(path, folder, data, lines, {name: ColumnType(kind_of(values)) for name, values in data.items()})


def _json_object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, line {number:,} is not JSON: {error}. Write one JSON object a line") from None
    if not isinstance(row, dict):
        raise DataError(f"{path}, line {number:,} is not a JSON object. Write one a line: {{...}}")
    return row


def _delimiter(path: Path, head: str) -> str:
    if path.suffix.lower() == ".tsv":
        return "\t"
    return max(",;\t", key=head.count)


def _check_header(path: Path, header: list[str]) -> None:
    if not header:
        raise DataError(f"{path} is empty. Its first line should name the columns")
    image = next((cell for cell in header if Path(cell).suffix.lower() in supported_suffixes()), None)
    if image is not None:
        raise DataError(f"the first line of {path} holds an image, {image}, instead of names. Add a header line")
    repeated = next((name for name in header if header.count(name) > 1), None)
    if repeated is not None:
        raise DataError(f"{path} has two columns called {repeated!r}. Rename one")


def kind_of(values: Sequence[Any]) -> ValueKind:
    """Return the type of JSON values that are the same in all rows; whole numbers are integers."""
    kinds = {_json_kind(value) for value in values if value is not None}
    if kinds == {"integer", "float"}:
        return "float"
    return kinds.pop() if len(kinds) == 1 else "other"


def _json_kind(value: Any) -> ValueKind:
    if isinstance(value, list):
        return "image" if value and isinstance(value[0], list) else "list"
    kinds: dict[type, ValueKind] = {str: "text", bool: "boolean", int: "integer", float: "float"}
    return kinds.get(type(value), "other")


def _unreadable(path: Path, error: Exception) -> DataError:
    if isinstance(error, UnicodeDecodeError):
        return DataError(f"{path} is not UTF-8 text. Save it as UTF-8")
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return DataError(f"cannot read {path}: {reason}")
