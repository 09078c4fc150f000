"""Datasets of Hugging Face's `datasets` as tables: images stay encoded, so that they are decoded by petune's rules."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from petune.base.errors import DataError
from petune.base.text import plural
from petune.data.cache import temporary_dir
from petune.data.manifest import digest
from petune.data.tables.parquet import PART, arrow_contents, column_type, declared_features
from petune.data.tables.table import ColumnType, Table, listed
from petune.data.tables.targets import split_named

HIDDEN = -1
"""Class of images whose labels are not public."""


class HfTable:
    """A split of a dataset; see `Table`.

    Args:
        data: A `datasets.Dataset`.
        title: The dataset as it is written on the command line.
    """

    def __init__(self, data: Any, title: str) -> None:
        self.title = title
        self.folder = Path()
        self._data = undecoded(data)
        self._features = self._data.features.to_dict()

    @property
    def info(self) -> Any:
        """License, citation and sizes, as `datasets` knows them."""
        return self._data.info

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the features."""
        return tuple(self._data.column_names)

    def __len__(self) -> int:
        return len(self._data)

    def type_of(self, column: str) -> ColumnType:
        """Return the type of a feature."""
        arrow_type = self._data.features.arrow_schema.field(column).type
        return column_type(arrow_type, self._features[column])

    def values(self, column: str) -> list[Any]:
        """Return the values of a column."""
        table = self._data.select_columns([column]).with_format("arrow")[:]
        values: list[Any] = table[column].to_pylist()
        return values

    def contents(self, column: str) -> Iterator[list[Any]]:
        """Yield encoded images, arrays or paths."""
        for table in self._data.select_columns([column]).with_format("arrow").iter(PART):
            yield [content for chunk in table[column].chunks for content in arrow_contents(chunk)]

    def row_name(self, row: int) -> str:
        """Return the number of a row."""
        return f"row {row:,}"

    def keys(self) -> Sequence[str] | None:
        """Return None: rows have no names."""
        return None

    def version(self) -> Any:
        """Return the fingerprint that `datasets` computes."""
        return ["datasets", self._data._fingerprint]

    def digest(self) -> str:
        """Return a digest of features and sizes: a published revision does not change."""
        return digest([len(self), self._data.info.dataset_size, self._features])


def check_same_features(files: Sequence[Path], title: str) -> None:
    """Check that Parquet files of one dataset have the same columns and class names; `datasets` reads the first's only.

    Raises:
        DataError: Two files differ; the message names them.
    """
    import pyarrow.parquet as pq

    first: dict[str, ColumnType] = {}
    for file in files:
        try:
            schema = pq.read_schema(file)
        except Exception:  # Arrow raises its own errors; `datasets` tells that the file is damaged
            continue
        features = declared_features(schema.metadata or {})
        types = {field.name: column_type(field.type, features.get(field.name)) for field in schema}
        first = first or types
        other = next((name for name in {**first, **types} if first.get(name) != types.get(name)), None)
        if other is not None:
            problem = "has other types or classes" if other in first and other in types else "is not in both"
            raise DataError(
                f"{title}: the column {other} {problem} in {files[0].name} and {file.name}. Write the files with the "
                "same columns, types and class names"
            )


def undecoded(data: Any) -> Any:
    """Return a dataset whose images are bytes or paths: `datasets` gives palette indices and CMYK as they are."""
    import datasets

    for name, feature in (data.features or {}).items():
        if isinstance(feature, datasets.Image):
            data = data.cast_column(name, datasets.Image(decode=False))
    return data


def splits_by_name(splits: Mapping[str, Table], title: str) -> tuple[dict[str, Table], str]:
    """Return train, val and test of a dataset, and a note about splits that are not used.

    Raises:
        DataError: No split is for training, or two have the same meaning.
    """
    unused = [f"{name} (empty)" for name, table in splits.items() if not len(table)]
    splits = {name: table for name, table in splits.items() if len(table)}
    if len(splits) == 1:
        return {"train": next(iter(splits.values()))}, _unused_note(unused)
    named: dict[str, str] = {}
    for name in splits:
        part = split_named(name)
        if part is None:
            unused.append(name)
        elif part in named:
            raise DataError(f"{title} has two splits for {part}: {named[part]} and {name}. Merge them, or drop one")
        else:
            named[part] = name
    if "train" not in named:
        raise DataError(f"{title} has no split for training. Splits: {listed(list(splits))}")
    found: dict[str, Table] = {part: splits[named[part]] for part in ("train", "val", "test") if part in named}
    return found, _unused_note(unused)


def _unused_note(unused: Sequence[str]) -> str:
    return f"splits not used: {listed(unused)}" if unused else ""


def without_hidden(parts: dict[str, Table], label: str | None) -> tuple[dict[str, Table], str]:
    """Leave out splits other than train whose labels are hidden, as in many competitions.

    Args:
        parts: The splits.
        label: The column of the class; None if the targets are others.
    """
    hidden = []
    for part, table in parts.items():
        is_class = label is not None and part != "train" and label in table.columns and table.type_of(label).names
        if is_class and {*table.values(str(label))} == {HIDDEN}:
            hidden.append(part)
    note = f"{' and '.join(hidden)} not used: the labels are hidden" if hidden else ""
    return {part: table for part, table in parts.items() if part not in hidden}, note


def store_streams(streams: Mapping[str, Any], folder: Path, title: str) -> None:
    """Read each split of a stream once, into a Parquet file with the images in it.

    Args:
        streams: A `datasets.IterableDataset` by the name of the split.
        folder: Where to write; nothing is left there if reading fails, or after the next stream if it was killed.
        title: The dataset, for messages.

    Raises:
        DataError: Reading fails, or the disk is full.
    """
    try:
        with temporary_dir(folder.parent) as temporary:
            for name, stream in streams.items():
                _store_stream(stream, temporary / f"{name}.parquet", f"{title}, {name}")
            os.replace(temporary, folder)
    except OSError as error:
        if not folder.is_dir():  # otherwise another process was faster
            raise DataError(f"cannot write {folder}: {error.strerror}. Set PETUNE_CACHE to another directory") from None


def _store_stream(stream: Any, file: Path, title: str) -> None:
    import pyarrow.parquet as pq
    from datasets.table import embed_table_storage

    rows = 0
    try:
        stream = undecoded(stream if stream.features is not None else stream._resolve_features())
        schema = stream.features.arrow_schema
        with pq.ParquetWriter(file, schema) as writer:
            for table in stream.with_format("arrow").iter(PART):
                writer.write_table(embed_table_storage(table.cast(schema)))
                rows += len(table)
    except Exception as error:  # the network, the files and the disk raise dozens of types
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataError(f"reading {title} stopped after {plural(rows, 'row')}: {reason}. Run it again") from None
