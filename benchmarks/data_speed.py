"""Measure how fast petune decodes and augments images, side by side with timm's loader at the same number of workers.

    python benchmarks/data_speed.py                        # 3,000 JPEGs of 500x375, three rounds, some minutes
    python benchmarks/data_speed.py --images 60 --rounds 1 # to see that it runs

A round runs each measurement of both, one after the other; a ratio is taken within a round, because the speed of a
machine changes. petune's threads and timm's processes run on the same cores. Expected: 1.5 times as fast as timm when
images are decoded for the first time, and 3 times in an augmented epoch at 224 pixels from the cache. CPU times count
all threads and processes, and change less than times do on a busy machine. As in training, freed memory stays in the
process (`petune.base.malloc`).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset, create_loader

from petune.data.batches import TrainBatches
from petune.data.folder import load_folder
from petune.data.images import num_threads
from petune.data.preprocess import Preprocess

SIDE, BATCH_SIZE = 224, 64
CPU = torch.device("cpu")
MEAN = STD = (0.5, 0.5, 0.5)
SCALE = (0.35, 1.0)  # of petune's preset crop


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare petune's images with timm's loader.")
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory) / "images"
        write_images(folder, options.images)
        os.environ["PETUNE_CACHE"] = f"{directory}/cache"
        steps = {"decode": (decode, timm_decode), "epoch": (epoch, timm_epoch)}
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in steps}
        for _ in range(options.rounds):
            for name, (mine, theirs) in steps.items():
                rounds[name].append({"petune": measured(mine, folder), "timm": measured(theirs, folder)})
    print(json.dumps({"workers": num_threads(), "load": os.getloadavg(), "rounds": rounds}, indent=1))
    for name, measurements in rounds.items():
        print(f"{name}: petune is {ratio(measurements, 'wall')} times as fast (CPU time: {ratio(measurements, 'cpu')})")


def write_images(folder: Path, count: int) -> None:
    """Write JPEGs of 500x375 with detail at several scales, about 50 kB each, in two classes, nine tenths in train."""
    generator = np.random.default_rng(0)
    for i in range(count):
        layers = [
            np.asarray(Image.fromarray(generator.integers(0, 256, (375 // s + 1, 500 // s + 1, 3), np.uint8)).resize(
                (500, 375), Image.Resampling.BICUBIC
            ), np.float32) * weight
            for s, weight in ((64, 0.45), (16, 0.3), (4, 0.2), (1, 0.05))
        ]  # fmt: skip
        file = folder / ("test" if i % 20 < 2 else "train") / f"class{i % 2}" / f"{i:05}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(sum(layers).clip(0, 255).astype(np.uint8)).save(file, quality=90)


def decode(folder: Path) -> int:
    """Decode every image into an empty cache."""
    shutil.rmtree(os.environ["PETUNE_CACHE"], ignore_errors=True)
    dataset = load_folder(folder, SIDE)
    return len(dataset.train) + len(dataset.test)


def timm_decode(folder: Path) -> int:
    """Decode every image by timm's loader for evaluation."""
    return sum(
        count_images(timm_loader(folder / split, is_training=False, crop_pct=0.875)) for split in ("train", "test")
    )


def epoch(folder: Path) -> int:
    """Augment every training image once, from the cache."""
    train = load_folder(folder, SIDE).train
    return sum(
        len(b.y_B) for b in TrainBatches(train, Preprocess(SIDE, MEAN, STD), "crop", BATCH_SIZE, 0, CPU).epoch(0)
    )


def timm_epoch(folder: Path) -> int:
    """Decode and augment every training image once, as an epoch of timm does."""
    return count_images(
        timm_loader(folder / "train", is_training=True, scale=SCALE, ratio=(1.0, 1.0), hflip=0.5, color_jitter=None)
    )


def timm_loader(folder: Path, **options: Any) -> Iterable[Any]:
    """Return timm's loader as `train.py` of timm makes it, for a CPU."""
    return create_loader(
        create_dataset("", str(folder)), (3, SIDE, SIDE), BATCH_SIZE, num_workers=num_threads(), mean=MEAN, std=STD,
        interpolation="bicubic", device=CPU, persistent_workers=False, **options,
    )  # fmt: skip


def count_images(loader: Iterable[Any]) -> int:
    """Run through a loader."""
    return sum(len(x) for x, _ in loader)


def measured(step: Callable[[Path], int], folder: Path) -> dict[str, float]:
    """Return images per second, and per second of CPU time."""
    cpu, start = cpu_time(), time.perf_counter()
    count = step(folder)
    return {"wall": count / (time.perf_counter() - start), "cpu": count / (cpu_time() - cpu)}


def cpu_time() -> float:
    """Return the CPU time of this process and its finished children, in seconds."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def ratio(measurements: list[dict[str, Any]], key: str) -> str:
    """Return the median of petune's speed relative to timm's, and the range."""
    ratios = sorted(row["petune"][key] / row["timm"][key] for row in measurements)
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


if __name__ == "__main__":
    main()
