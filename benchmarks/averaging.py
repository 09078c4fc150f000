"""Measure what averaging adapters gains: three seeds of a method, and the averages of them, on test.

python benchmarks/averaging.py --train      # the runs, into runs/averaging: a quarter of an hour on one core
python benchmarks/averaging.py              # the averages and benchmarks/results/averaging.json; trains what is missing
python benchmarks/tables.py                 # the table in docs/results.md

vit_nano on a part of CIFAR-10: 50 training images per class, drawn by the seed; 1,000 other images, the same for every
seed, choose what is averaged; 2,500 images are test.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import petune

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "runs" / "averaging"
SEEDS = (0, 1, 2)
ROWS = {"train": 6_000, "test": 2_500}
"""Rows of CIFAR-10 that are used; a sixth of train is val."""
METHODS = {"lora": "lora", "adaptformer": "adaptformer:bottleneck=16"}
COMMON_START = "adaptformer-continued"
"""AdaptFormer from one adapter, trained for an epoch with seed 0: the three seeds have a start in common."""
RUN: dict[str, Any] = {"backbone": "vit_nano", "dataset": "cifar10", "val_fraction": 1 / 6, "shots": 50}
TRAIN: dict[str, Any] = {"epochs": 5, "batch_size": 25}


def cut_data() -> Path:
    """Write the first rows of CIFAR-10's Parquet files; return their data directory."""
    import pyarrow.parquet as pq

    target = RUNS / "data"
    source = Path(os.environ["PETUNE_DATA"]) / "cifar10"
    (target / "cifar10").mkdir(parents=True, exist_ok=True)
    for part, rows in ROWS.items():
        file = target / "cifar10" / f"{part}.parquet"
        if not file.exists():
            pq.write_table(pq.read_table(source / file.name).slice(0, rows), file)
    return target


def train() -> dict[str, list[Path]]:
    """Train what is missing; return the run directories of each method, in the order of the seeds."""
    runs = {name: [_run(f"{name}-{seed}", method, seed) for seed in SEEDS] for name, method in METHODS.items()}
    start = _run("start", METHODS["adaptformer"], 0, train={**TRAIN, "epochs": 1})
    runs[COMMON_START] = [
        _run(f"{COMMON_START}-{seed}", METHODS["adaptformer"], seed, from_run=start) for seed in SEEDS
    ]
    return runs


def _run(name: str, method: str, seed: int, **more: Any) -> Path:
    given = {"method": method, "seed": seed, "train": TRAIN, "data_dir": cut_data(), **RUN, **more}
    petune.run(output=RUNS / name, resume=True, **given)
    return RUNS / name


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--train", action="store_true", help="only train")
    arguments = parser.parse_args()
    train()
