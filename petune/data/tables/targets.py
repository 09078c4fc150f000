"""Turn columns into targets: classes in natural order, several classes, numbers; weights, groups and splits."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from petune.base.errors import DataError, did_you_mean
from petune.base.text import plural
from petune.data.split_names import SHORT_NAMES, split_of
from petune.data.tables.columns import TargetColumns
from petune.data.tables.options import ColumnOptions
from petune.data.tables.table import Table, check_column, first_rows, listed
from petune.data.target import Target

TRUTH = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}


@dataclass(frozen=True)
class Encoded:
    """Targets of all rows.

    Attributes:
        target: Kind and names.
        targets: See `Target`.
        note: What users should look at; empty if nothing is odd.
    """

    target: Target
    targets: NDArray[Any]
    note: str = ""


def encode(table: Table, columns: TargetColumns, options: ColumnOptions) -> Encoded:
    """Encode classes, several classes or numbers; for masks see `petune.data.tables.masks`.

    Raises:
        DataError: A value is missing, or is not what the columns should hold; the message names rows.
    """
    if columns.kind == "number":
        numbers = [_numbers(table, column, "target") for column in columns.columns]
        return Encoded(Target("number", columns.columns), np.stack(numbers, 1))
    if columns.is_one_per_class:
        return _encode_flags(table, columns.columns)
    if isinstance(options.classes, Mapping):
        raise DataError("classes maps values to names only for masks. Write classes=[a, b]")
    (column,) = columns.columns
    declared = tuple(options.classes) if options.classes else table.type_of(column).names
    if columns.kind == "class":
        return _encode_classes(table, column, declared, options)
    return _encode_lists(table, column, declared, options)


def weights_of(table: Table, column: str) -> NDArray[np.float64]:
    """Return the weight of each row.

    Raises:
        DataError: There is no such column, or a value is not a number from 0.
    """
    weights = _numbers(table, check_column(table, column, "weight"), "weight")
    negative = np.flatnonzero(weights < 0).tolist()
    if negative:
        raise DataError(f"{table.title}: weight is negative in {first_rows(table, negative)}. Use weights from 0")
    return weights


def groups_of(table: Table, column: str) -> tuple[NDArray[np.int64], list[str]]:
    """Return the group of each row, and the names of the groups.

    Raises:
        DataError: There is no such column, or a row has no group.
    """
    names = _texts(table, check_column(table, column, "group"), "group")
    known = natural_order(set(names))
    number = {name: i for i, name in enumerate(known)}
    return np.array([number[name] for name in names], np.int64), known


def splits_of(table: Table, column: str) -> dict[str, NDArray[np.int64]]:
    """Return the rows of train, val and test.

    Raises:
        DataError: There is no such column, a value names no split, or no row is in train.
    """
    names = _texts(table, check_column(table, column, "split"), "split")
    splits = {name: split_named(name) for name in set(names)}
    unknown = natural_order(name for name, split in splits.items() if split is None)
    if unknown:
        raise DataError(
            f"{table.title}: {column} has values that name no split: {listed(unknown)}. Use train, val and test"
        )
    parts = np.array([splits[name] for name in names])
    found = {part: np.flatnonzero(parts == part) for part in ("train", "val", "test")}
    if not len(found["train"]):
        raise DataError(f"{table.title}: no row has train in {column}. Values: {listed(natural_order(set(names)))}")
    return {part: rows for part, rows in found.items() if len(rows)}


def split_named(name: str) -> str | None:
    """Return the split that a value means; None if it means none."""
    return split_of(name) or SHORT_NAMES.get(name.strip().casefold())


def natural_order(names: Iterable[str]) -> list[str]:
    """Sort names as people do: 1, 2, 10, without regard to case."""

    def key(name: str) -> tuple[list[str | int], str]:
        pieces = re.split(r"(\d+)", name.casefold())
        return [int(piece) if i % 2 else piece for i, piece in enumerate(pieces)], name

    return sorted(names, key=key)


def _encode_classes(table: Table, column: str, declared: tuple[str, ...] | None, options: ColumnOptions) -> Encoded:
    if table.type_of(column).names is not None:
        labels = _declared_numbers(table, column, table.type_of(column).names or ())
        names = table.type_of(column).names or ()
        if options.classes and tuple(options.classes) != names:
            raise DataError(f"{table.title} already names the classes of {column}: {listed(names)}. Leave classes out")
        return Encoded(Target("class", names), np.array(labels, np.int64))
    texts = _texts(table, column, "label")
    names = declared or tuple(natural_order(set(texts)))
    number = _number_of(table, column, names, texts)
    note = "" if declared else _similar_note(names)
    return Encoded(Target("class", names), np.array([number[text] for text in texts], np.int64), note)


def _encode_lists(table: Table, column: str, declared: tuple[str, ...] | None, options: ColumnOptions) -> Encoded:
    has_names = table.type_of(column).names is not None
    rows: list[list[Any]] = []
    for row, value in enumerate(table.values(column)):
        items = value if isinstance(value, list) else _separated(table, column, row, value, options.separator)
        bad = [item for item in items if item is None or (isinstance(item, str) and not item.strip())]
        if bad or (has_names and not all(isinstance(i, int) and 0 <= i < len(declared or ()) for i in items)):
            raise DataError(
                f"{table.title}, {table.row_name(row)}: {column} holds an empty or unknown label: {value!r}"
            )
        rows.append([(declared or ())[item] for item in items] if has_names else [_text(item) for item in items])
    if not has_names and _are_flags(table, column):
        return _encode_flag_lists(table, column, rows, declared)
    twice = next((i for i, row in enumerate(rows) if len({*row}) < len(row)), None)
    if twice is not None:
        raise DataError(f"{table.title}, {table.row_name(twice)}: {column} holds a label twice: {rows[twice]}")
    names = declared or tuple(natural_order({name for row in rows for name in row}))
    if not names:
        raise DataError(f"{table.title}: {column} has no label in any row, so there is nothing to learn")
    number = _number_of(table, column, names, [name for row in rows for name in row])
    hot = np.zeros((len(rows), len(names)), np.uint8)
    for row, labels in enumerate(rows):
        hot[row, [number[name] for name in labels]] = 1
    notes = [_without_label_note(hot), "" if declared else _similar_note(names)]
    return Encoded(Target("multi_hot", names), hot, "; ".join(filter(None, notes)))


def _are_flags(table: Table, column: str) -> bool:
    """Return True for lists of one length that hold 0 and 1 only, and one of them twice: no list of labels does."""
    values = table.values(column)
    if not all(isinstance(value, list) and len(value) == len(values[0]) for value in values):
        return False
    numbers = {type(item) in {int, bool, float} and item in {0, 1} for value in values for item in value}
    return numbers == {True} and any(len({*value}) < len(value) for value in values)


def _encode_flag_lists(table: Table, column: str, rows: list[list[str]], declared: tuple[str, ...] | None) -> Encoded:
    """Encode lists with a 0 or 1 for each class, whose names have to be declared."""
    num_classes = len(rows[0])
    if declared is None or len(declared) != num_classes:
        wrong = f", and classes names {len(declared)}" if declared else ""
        raise DataError(
            f"{table.title}: {column} holds lists of 0 and 1, one for each of {num_classes} classes{wrong}. Name them "
            "in order: classes=[a, b, …]"
        )
    hot = np.array([[int(TRUTH[item]) for item in row] for row in rows], np.uint8)
    return Encoded(Target("multi_hot", declared), hot, _without_label_note(hot))


def _without_label_note(hot: NDArray[np.uint8]) -> str:
    without = int((hot.sum(1) == 0).sum())
    return f"{plural(without, 'image')} without any label" if without else ""


def _encode_flags(table: Table, columns: Sequence[str]) -> Encoded:
    flags = []
    for column in columns:
        values = [TRUTH.get(_text(value).strip().casefold()) for value in table.values(column)]
        wrong = [row for row, value in enumerate(values) if value is None]
        if wrong:
            raise DataError(
                f"{table.title}: {column} is not 0 or 1 in {first_rows(table, wrong)}, but "
                f"{table.values(column)[wrong[0]]!r}. labels=[…] takes a column of 0 and 1 for each class"
            )
        flags.append(values)
    return Encoded(Target("multi_hot", tuple(columns)), np.array(flags, np.uint8).T.copy())


def _separated(table: Table, column: str, row: int, value: Any, separator: str | None) -> list[Any]:
    if value is None:
        raise DataError(f"{table.title}, {table.row_name(row)}: {column} is missing. Write an empty list for no label")
    if separator is None:
        raise DataError(
            f"{table.title}: {column} holds {value!r}, which is not a list. Give separator=… for several classes, or "
            f"label={column} for one"
        )
    text = _text(value)
    return [item.strip() for item in text.split(separator)] if text.strip() else []


def _declared_numbers(table: Table, column: str, names: Sequence[str]) -> list[int]:
    values = table.values(column)
    wrong = [row for row, value in enumerate(values) if not (isinstance(value, int) and 0 <= value < len(names))]
    if wrong:
        raise DataError(
            f"{table.title}: {column} has no class of 0..{len(names) - 1} in {first_rows(table, wrong)} "
            f"({values[wrong[0]]!r}), {plural(len(wrong), 'row')} in all. Label or remove these rows"
        )
    return values


def _texts(table: Table, column: str, option: str) -> list[str]:
    """Return values as text: the names of classes, groups or splits."""
    values = table.values(column)
    texts = [_text(value) for value in values]
    empty = [row for row, text in enumerate(texts) if not text.strip()]
    if empty:
        raise DataError(
            f"{table.title}: {column} is empty in {first_rows(table, empty)}, {plural(len(empty), 'row')} in all. "
            "Fill in or remove these rows"
        )
    wrong = [row for row, value in enumerate(values) if not isinstance(value, str | bool | int | float)]
    fraction = [row for row, value in enumerate(values) if isinstance(value, float) and not value.is_integer()]
    if wrong or fraction:
        row = [*wrong, *fraction][0]
        advice = f"Use target={column} for numbers" if fraction else f"Use text or whole numbers for {option}"
        raise DataError(f"{table.title}, {table.row_name(row)}: {column} holds {values[row]!r}. {advice}")
    return texts


def _text(value: Any) -> str:
    """Return 1 for 1.0 and true for True; nothing for a missing value."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _numbers(table: Table, column: str, option: str) -> NDArray[np.float64]:
    values = table.values(column)
    numbers = np.array([_number(value) for value in values], np.float64)
    wrong = np.flatnonzero(~np.isfinite(numbers)).tolist()
    if wrong:
        is_class = option == "target" and Counter(map(str, values)).most_common(1)[0][1] > 1
        advice = f". If {column} holds classes, write label={column}" if is_class else ""
        raise DataError(
            f"{table.title}: {column} is not a finite number in {first_rows(table, wrong)} ({values[wrong[0]]!r}), "
            f"{plural(len(wrong), 'row')} in all. Correct or remove these rows{advice}"
        )
    return numbers


def _number(value: Any) -> float:
    if isinstance(value, bool) or (isinstance(value, str) and "_" in value):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _number_of(table: Table, column: str, names: Sequence[str], texts: Sequence[str]) -> dict[str, int]:
    number = {name: i for i, name in enumerate(names)}
    unknown = next((row for row, text in enumerate(texts) if text not in number), None)
    if unknown is not None:
        raise DataError(
            f"{table.title}: {column} holds {texts[unknown]!r}, which classes does not name"
            f"{did_you_mean(texts[unknown], names)}"
        )
    return number


def _similar_note(names: Sequence[str]) -> str:
    """Name classes that differ in case or spaces only: most often a typing error."""
    first: dict[str, str] = {}
    pairs = []
    for name in names:
        twin = first.setdefault(" ".join(name.split()).casefold(), name)
        if twin is not name:
            pairs.append(f"{twin!r} and {name!r}")
    return f"classes that differ only in case or spaces: {listed(pairs, 3)}" if pairs else ""
