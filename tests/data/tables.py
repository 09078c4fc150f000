"""Write small tables of real images: scikit-learn's digits, each drawn in another size."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

from petune.data import Dataset, load_dataset

Rows = Sequence[Mapping[str, Any]]


digits = cache(load_digits)


def digit(i: int, side: int = 12) -> NDArray[np.uint8]:
    """Return a digit, uint8 (S, S)."""
    pixels = (digits().images[i] * 15.9).astype(np.uint8)
    return np.asarray(Image.fromarray(pixels).resize((side, side)))


def digit_class(i: int) -> int:
    return int(digits().target[i])


def write_images(folder: Path, count: int) -> list[str]:
    """Write digits as PNG files and return their names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{i}.png" for i in range(count)]
    for i, name in enumerate(names):
        Image.fromarray(digit(i)).save(folder / name)
    return names


def write_table(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write a table in the format that its suffix names."""
    rows = list(rows)
    if path.suffix == ".jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    elif path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


def load(path: Path, options: str = "", **arguments: Any) -> Dataset:
    """Load `table:PATH,OPTIONS` with images of 8 pixels."""
    return load_dataset(f"table:{path}{',' if options else ''}{options}", **{"image_size": 8, **arguments})
