"""Decide the meaning of a table before any image is decoded: columns, targets, splits, groups, and their errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from petune.base.errors import DataError
from petune.data.find_images import size_and_time
from petune.data.manifest import Manifest, digest, name_below
from petune.data.tables.columns import TargetColumns, image_column, target_columns
from petune.data.tables.contents import ImageColumn
from petune.data.tables.masks import MaskCodes, mask_target
from petune.data.tables.options import ColumnOptions
from petune.data.tables.table import Table, listed
from petune.data.tables.targets import Encoded, encode, groups_of, split_named, splits_of, weights_of
from petune.data.target import Target

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Plan:
    """A table with the meaning of its columns.

    Attributes:
        table: The rows.
        options: As given.
        images: The column of the images.
        columns: The columns of the targets.
        parts: Rows of each split that the table has; all are `train` if it has none.
        has_splits: The table has a column of splits.
        weights, groups: By row; None if there are none.
        note: What users should know about the columns.
    """

    table: Table
    options: ColumnOptions
    images: ImageColumn
    columns: TargetColumns
    parts: Mapping[str, Rows]
    has_splits: bool
    weights: NDArray[np.float64] | None
    groups: Rows | None
    note: str

    @classmethod
    def of(cls, table: Table, options: ColumnOptions) -> Plan:
        """Decide what the columns mean.

        Raises:
            DataError: The table is empty, a column is not there or not clear, or a value is wrong.
        """
        if not len(table):
            raise DataError(f"{table.title} has no rows")
        image = image_column(table, options)
        columns = target_columns(table, options, image)
        split, note = _split_column(table, options)
        parts = {"train": np.arange(len(table))} if split is None else splits_of(table, split)
        weights = None if options.weight is None else weights_of(table, options.weight)
        if weights is not None and not weights[parts["train"]].any():
            raise DataError(f"{table.title}: {options.weight} is 0 in all rows of train. Leave weight out")
        groups = None if options.group is None else _groups(table, options.group, parts)
        images = ImageColumn(table, image, options.channels_first)
        return cls(table, options, images, columns, parts, split is not None, weights, groups, note)

    @cached_property
    def masks(self) -> ImageColumn:
        """The column of the masks, if the targets are masks."""
        return ImageColumn(self.table, self.columns.columns[0])

    @cached_property
    def codes(self) -> MaskCodes:
        """The classes of values in masks."""
        return MaskCodes.of(self.options)

    @cached_property
    def encoded(self) -> Encoded:
        """Targets of all rows, unless they are masks.

        Raises:
            DataError: A value is missing or wrong.
        """
        return encode(self.table, self.columns, self.options)

    @property
    def target(self) -> Target:
        """Kind and names of the targets."""
        return mask_target(self.masks, self.codes) if self.columns.kind == "mask" else self.encoded.target

    @cached_property
    def row_names(self) -> list[str]:
        """The file or key of each row, for people."""
        files, keys = self.images.files, self.table.keys()
        if files is not None:
            return [str(file) for file in files]
        return list(keys) if keys is not None else [self.table.row_name(row) for row in range(len(self.table))]

    def manifest(self) -> Manifest:
        """Return a digest of targets and images by split, and by class where each image has one."""
        is_mask = self.columns.kind == "mask"
        targets = self._targets_for_manifest()
        entries = list(zip(self._files(self.images), targets, *self._extra_columns(), strict=True))
        has_files = self.images.files is not None and (not is_mask or self.masks.files is not None)
        version = None if has_files else self.table.digest()
        return {part: self._entries(rows, entries, version) for part, rows in self.parts.items()}

    def _entries(self, rows: Rows, entries: list[Any], version: str | None) -> dict[str, str]:
        by_class: dict[str, list[Any]] = {}
        for row in rows.tolist():
            name = "images"
            if self.columns.kind == "class":
                name = self.encoded.target.names[int(self.encoded.targets[row])]
            by_class.setdefault(name, []).append(entries[row])
        return {name: f"{len(items)} {digest([version, items])}" for name, items in by_class.items()}

    def _targets_for_manifest(self) -> list[Any]:
        if self.columns.kind == "mask":
            return self._files(self.masks)
        if self.columns.kind == "class":  # the class is the key of the entry
            return [None] * len(self.table)
        return list(self.encoded.targets.tolist())

    def _files(self, column: ImageColumn) -> list[Any]:
        """Return names and sizes of files; None for each row if the table holds the images."""
        if column.files is None:
            return [None] * len(self.table)
        return [_file(path, self.table.folder) for path in column.files]

    def _extra_columns(self) -> list[list[Any]]:
        return [values.tolist() for values in (self.weights, self.groups) if values is not None]


def _file(path: Path, folder: Path) -> tuple[str, int]:
    return name_below(path, folder), size_and_time(path)[0]


def _split_column(table: Table, options: ColumnOptions) -> tuple[str | None, str]:
    """Return the column of the splits, and a note where a column called split is not used."""
    if options.split is not None:
        return options.split, ""
    called = next((column for column in table.columns if column.casefold() == "split"), None)
    if called is None:
        return None, ""
    if any(split_named(str(value)) for value in table.values(called)):
        return called, ""
    return None, f"the column {called} is not used, because its values name no splits"


def _groups(table: Table, column: str, parts: Mapping[str, Rows]) -> Rows:
    groups, names = groups_of(table, column)
    seen: dict[int, str] = {}
    divided = []
    for part, rows in parts.items():
        for group in np.unique(groups[rows]).tolist():
            if seen.setdefault(group, part) != part:
                divided.append(f"{names[group]} is in {seen[group]} and {part}")
    if divided:
        raise DataError(
            f"{table.title}: groups of {column} are divided between splits: {listed(divided, 3)}. Move all rows of a "
            "group into one split"
        )
    if len(names) < 2:
        raise DataError(
            f"{table.title}: {column} has one group only, {names[0]}, which cannot be divided. Leave group out"
        )
    return groups
