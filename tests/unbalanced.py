"""An unbalanced folder of four classes, made of real images of CIFAR-10; skipped where they are not there."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from PIL import Image

REAL = Path(os.environ.get("PETUNE_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
COUNTS = {"airplane": 80, "cat": 8, "frog": 40, "ship": 12}
LABELS = {"airplane": 0, "cat": 3, "frog": 6, "ship": 8}


def make_folder(path: Path, counts: dict[str, int] | None = None, test: int = 25) -> Path:
    """Write `path/train/CLASS/*.png`, of which each class has its own number, and `path/test`, equally many of each."""
    file = REAL / "cifar10" / "train.parquet"
    if not file.is_file():
        pytest.skip(f"no {file}")
    import pyarrow.parquet as pq

    left = {LABELS[name]: [name, count, test] for name, count in (counts or COUNTS).items()}
    rows = pq.ParquetFile(file)
    for group in range(rows.num_row_groups):
        for row in rows.read_row_group(group, columns=["img", "label"]).to_pylist():
            wanted = left.get(row["label"])
            if wanted is None or not (wanted[1] or wanted[2]):
                continue
            split = 1 if wanted[1] else 2
            folder = path / ("train" if split == 1 else "test") / str(wanted[0])
            folder.mkdir(parents=True, exist_ok=True)
            Image.open(io.BytesIO(row["img"]["bytes"])).convert("RGB").save(folder / f"{wanted[split]:04d}.png")
            wanted[split] -= 1
        if not any(wanted[1] or wanted[2] for wanted in left.values()):
            break
    return path
