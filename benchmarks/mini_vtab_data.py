"""Write the five datasets of the suite mini-vtab in VTAB's layout, from the Parquet files in ../shared/data.

    python benchmarks/mini_vtab_data.py --source ../shared/data --output runs/mini-vtab

Each has 1,000 training images, equally many of each class, drawn once by seed 0: 800 to train and 200 to choose, as in
VTAB-1k (Zhai et al., 2019, arXiv:1910.04867). The test images are all that there are. A dataset that is there
already is left alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from any_task_data import balanced, read_images, save_all
from PIL import Image

from petune.data.dataset import Split
from petune.data.digits import load_digits

LABELS = {"cifar10": "label", "cifar100": "fine_label", "fashion_mnist": "label", "sign_digits": "label"}
"""The column of the classes in the Parquet files."""
DATASETS = (*LABELS, "digits")
TRAIN, VAL = 800, 200
Images = tuple[list[Image.Image], list[str]]
"""Images and the names of their classes."""


def read(name: str, source: Path) -> tuple[Images, Images]:
    """Return the images of train and of test."""
    if name == "digits":
        digits = load_digits()
        return _images_of(digits.train), _images_of(digits.test)
    train, test = (read_images(source / name / f"{part}.parquet", LABELS[name]) for part in ("train", "test"))
    return train, test


def write(name: str, source: Path, folder: Path) -> None:
    """Write one dataset; `test.txt` comes last, so a folder that has it is complete."""
    parts = dict(zip(("train", "test"), read(name, source), strict=True))
    numbers = {label: number for number, label in enumerate(sorted(set(parts["train"][1])))}
    chosen = {
        "train": balanced(parts["train"][1], TRAIN + VAL, np.random.default_rng(0)),
        "test": list(range(len(parts["test"][1]))),
    }
    lines = {}
    for part, positions in chosen.items():
        images, labels = parts[part]
        save_all(images, positions, folder / "images" / part)
        lines[part] = [f"images/{part}/{i:05}.png {numbers[labels[i]]}" for i in positions]
    _write_lists(folder, lines["train"], lines["test"])


def _write_lists(folder: Path, both: Sequence[str], test: Sequence[str]) -> None:
    lists = {"train800val200": both, "train800": both[:TRAIN], "val200": both[TRAIN:], "test": test}
    for name, rows in lists.items():
        (folder / f"{name}.txt").write_text("\n".join(rows) + "\n")


def _images_of(split: Split) -> Images:
    images_NHWC = split.images_at(slice(None))
    return [Image.fromarray(image) for image in images_NHWC], [str(target) for target in split.targets]


def main() -> None:
    """Write what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    help_source = "folders with train.parquet and test.parquet"
    parser.add_argument("--source", type=Path, default=Path("../shared/data"), help=help_source)
    parser.add_argument("--output", type=Path, default=Path("runs/mini-vtab"))
    args = parser.parse_args()
    for name in DATASETS:
        if not (args.output / name / "test.txt").exists():
            write(name, args.source, args.output / name)
            print(f"wrote {args.output / name}")


if __name__ == "__main__":
    main()
