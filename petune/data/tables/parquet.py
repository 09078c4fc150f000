"""Read Parquet: images as bytes, arrays or paths; class names from the metadata that `datasets` writes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from petune.base.errors import DataError
from petune.data.cache import file_key
from petune.data.manifest import file_digest
from petune.data.tables.table import ColumnType, ValueKind

PART = 256
OTHER_MEDIA = {"Audio", "Video", "Pdf", "Nifti"}
"""Features of `datasets` that are stored as images are, but hold something else."""


class ParquetTable:
    """A Parquet file; only the columns in use are read. See `Table`.

    Args:
        path: The file.
        folder: See `Table`.

    Raises:
        DataError: It is not a Parquet file.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        import pyarrow.parquet as pq

        self.path = path
        self.folder = folder
        try:
            self._file = pq.ParquetFile(path, memory_map=True)
        except Exception as error:  # Arrow raises its own errors below RuntimeError, MemoryError and others
            raise _unreadable(self.path, error) from None
        twice = [name for name, count in Counter(self.columns).items() if count > 1]
        if twice:
            raise DataError(f"{path} has two columns called {twice[0]}. Give them different names")

    @property
    def title(self) -> str:
        """The file."""
        return str(self.path)

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns."""
        return tuple(self._file.schema_arrow.names)

    def __len__(self) -> int:
        return int(self._file.metadata.num_rows)

    def type_of(self, column: str) -> ColumnType:
        """Return the type of a column, with the class names that the metadata has."""
        schema = self._file.schema_arrow
        return column_type(schema.field(column).type, declared_features(schema.metadata or {}).get(column))

    def values(self, column: str) -> list[Any]:
        """Return the values of a column."""
        try:
            values: list[Any] = self._file.read(columns=[column])[column].to_pylist()
        except Exception as error:
            raise _unreadable(self.path, error) from None
        return values

    def contents(self, column: str) -> Iterator[list[Any]]:
        """Yield the values of a column, a part of a row group at a time."""
        try:
            for batch in self._file.iter_batches(PART, columns=[column]):
                yield arrow_contents(batch.column(0))
        except OSError as error:  # Arrow's errors of a damaged file
            raise _unreadable(self.path, error) from None

    def row_name(self, row: int) -> str:
        """Return the number of a row, from 0 as Arrow counts."""
        return f"row {row:,}"

    def keys(self) -> Sequence[str] | None:
        """Return None: rows have no names."""
        return None

    def version(self) -> Any:
        """Return path, size and time of the file."""
        return file_key(self.path)

    def digest(self) -> str:
        """Return a digest of the file."""
        return file_digest(self.path)


def arrow_contents(values: Any) -> list[Any]:
    """Return images of an Arrow array: text, bytes, or arrays of the type of the column."""
    import numpy as np
    import pyarrow as pa

    if _storage(values.type) != values.type:
        values = values.storage
    leaf = _leaf(values.type)
    is_array = _depth(values.type) > 1 or isinstance(values.type, pa.FixedShapeTensorType)
    if isinstance(values.type, pa.FixedShapeTensorType):
        return list(values.to_numpy_ndarray())
    if not is_array:
        return [_bytes_or_path(value) for value in values.to_pylist()]
    dtype = np.dtype(leaf.to_pandas_dtype())
    return [None if value is None else _as_array(value, dtype) for value in values.to_pylist()]


def column_type(arrow_type: Any, feature: Any = None) -> ColumnType:
    """Return the type of an Arrow column.

    Args:
        arrow_type: Its type in Arrow.
        feature: What the metadata of `datasets` says about it, as JSON; None if there is none.
    """
    import pyarrow as pa

    if isinstance(feature, dict) and feature.get("_type") in OTHER_MEDIA:
        return ColumnType("other")
    if isinstance(arrow_type, pa.DictionaryType):
        return column_type(arrow_type.value_type, feature)
    arrow_type = _storage(arrow_type)
    checks: list[tuple[ValueKind, Any]] = [
        ("text", lambda t: pa.types.is_string(t) or pa.types.is_large_string(t) or t == pa.string_view()),
        ("boolean", pa.types.is_boolean),
        ("integer", pa.types.is_integer),
        ("float", lambda t: pa.types.is_floating(t) or pa.types.is_decimal(t)),
        ("image", _is_image),
        ("list", lambda t: _depth(t) == 1 and not pa.types.is_nested(_leaf(t))),
    ]
    kind: ValueKind = next((name for name, check in checks if check(arrow_type)), "other")
    return ColumnType(kind, _class_names(feature))


def declared_features(metadata: Mapping[bytes, bytes]) -> dict[str, Any]:
    """Return the features by column that `datasets` stores in a schema's metadata; empty if there are none."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def _class_names(feature: Any) -> tuple[str, ...] | None:
    """Return the names of a ClassLabel, or of a list of them."""
    while isinstance(feature, list | dict) and "names" not in feature:
        feature = (feature or [None])[0] if isinstance(feature, list) else feature.get("feature")
    names = feature.get("names") if isinstance(feature, dict) else None
    if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
        return tuple(names)
    return None


def _storage(arrow_type: Any) -> Any:
    """Return the lists behind the array types of `datasets`."""
    import pyarrow as pa

    is_extension = isinstance(arrow_type, pa.BaseExtensionType) and not isinstance(arrow_type, pa.FixedShapeTensorType)
    return arrow_type.storage_type if is_extension else arrow_type


def _is_image(arrow_type: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(arrow_type):
        return any(arrow_type.field(i).name == "bytes" for i in range(arrow_type.num_fields))
    is_binary = pa.types.is_binary(arrow_type) or pa.types.is_large_binary(arrow_type)
    return is_binary or isinstance(arrow_type, pa.FixedShapeTensorType) or _depth(arrow_type) > 1


def _depth(arrow_type: Any) -> int:
    """Return the number of lists around the values."""
    return 1 + _depth(arrow_type.value_type) if _is_list(arrow_type) else 0


def _leaf(arrow_type: Any) -> Any:
    return _leaf(arrow_type.value_type) if _is_list(arrow_type) else arrow_type


def _is_list(arrow_type: Any) -> bool:
    import pyarrow as pa

    return bool(
        pa.types.is_list(arrow_type) or pa.types.is_large_list(arrow_type) or pa.types.is_fixed_size_list(arrow_type)
    )


def _as_array(value: list[Any], dtype: Any) -> Any:
    import numpy as np

    try:
        return np.asarray(value, dtype)
    except (ValueError, TypeError):
        return value  # decoding refuses it


def _bytes_or_path(value: Any) -> Any:
    """Return the bytes of an image, or its path if it has none."""
    if not isinstance(value, dict):
        return value
    return value["bytes"] if value["bytes"] is not None else value.get("path")


def _unreadable(path: Path, error: Exception) -> DataError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return DataError(f"{path} is not a readable Parquet file: {reason}. Write or download it again")
