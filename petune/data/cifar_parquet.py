"""Read CIFAR from Parquet files in Hugging Face's layout."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from petune.base.errors import DataError
from petune.data.cache import Allocate, cached_split, file_key
from petune.data.dataset import Split

FORMAT = 1
SIDE = 32


def parquet_files(name: str, root: Path) -> dict[str, list[Path]] | None:
    """Return the Parquet files of train and test below `root`, or None if a split has none."""
    for folder in (root / name, root if root.name == name else root / name / "data"):
        files = {part: sorted(folder.glob(f"**/{part}*.parquet")) for part in ("train", "test")}
        if files["train"] and files["test"]:
            return files
    return None


def load_parquet(name: str, files: Mapping[str, list[Path]]) -> tuple[tuple[str, ...], str, Split, Split]:
    """Return class names, source, and the train and test splits.

    Args:
        name: `cifar10` or `cifar100`.
        files: See `parquet_files`.

    Raises:
        DataError: A file is damaged or has other contents.
    """
    column = "label" if name == "cifar10" else "fine_label"
    splits = {}
    for part, paths in files.items():
        key = {"format": FORMAT, "column": column, "files": [file_key(path) for path in paths]}
        splits[part] = cached_split(key, partial(_decode, paths, column))
    first = files["train"][0]
    return _class_names(first, column), str(first.parent), splits["train"], splits["test"]


def _decode(paths: list[Path], column: str, allocate: Allocate) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    import pyarrow.parquet as pq

    images: list[dict[str, Any]] = []
    labels: list[int] = []
    for path in paths:
        try:
            table = pq.read_table(path)
            images += table["img" if "img" in table.column_names else "image"].to_pylist()
            labels += np.asarray(table[column].to_pylist()).astype(np.int64, casting="same_kind").tolist()
        except Exception as error:  # Arrow raises its own errors below RuntimeError, MemoryError and others
            raise _unreadable(path, column, error) from None
    pixels = allocate(len(images), SIDE)
    for row, image in enumerate(images):
        try:
            pixels[row] = _decode_image(image["bytes"])
        except Exception as error:  # Pillow raises a dozen types, and each means that this image is broken
            raise DataError(
                f"{paths[0].parent}: image {row} is not a readable {SIDE}x{SIDE} image ({error}). Download it again"
            ) from None
    return np.asarray(labels, dtype=np.int64), np.arange(len(labels))


def _decode_image(content: bytes) -> NDArray[np.uint8]:
    from PIL import Image

    image = Image.open(io.BytesIO(content))
    if image.size != (SIDE, SIDE):
        raise ValueError(f"it is {image.width}x{image.height}")
    return np.asarray(image.convert("RGB"))


def _class_names(path: Path, column: str) -> tuple[str, ...]:
    """Return the class names from the file's metadata, or numbers if there are none."""
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_schema(path).metadata or {}
    except Exception as error:
        raise _unreadable(path, column, error) from None
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][column]["names"]
    except (KeyError, ValueError, TypeError, RecursionError):
        names = None
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        return tuple(names)
    return tuple(str(i) for i in range(10 if column == "label" else 100))


def _unreadable(path: Path, column: str, error: Exception) -> DataError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return DataError(f"{path} is not a Parquet file with an image and a {column!r} column: {reason}. Download it again")
