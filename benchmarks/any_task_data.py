"""The datasets of any_task.py, made by seed from real images: folders, tables, arrays and VTAB's layout.

Each function writes one dataset into a folder and returns the test metrics of a model that predicts the same for
every image, for comparison.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet
from cifar_tables import ANIMALS, compose
from numpy.typing import NDArray
from PIL import Image
from result_files import write_json
from sklearn.datasets import load_digits

CLASSES = ("cat", "ship", "frog", "airplane")
IMBALANCE = (1.0, 0.2, 0.06, 0.02)
"""Training images of each class, relative to the first one: 500, 100, 30 and 10."""
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
INK = 5
"""Value from which a pixel of scikit-learn's digits (0 to 16) belongs to the digit."""
Constant = dict[str, float]
"""Test metrics of a constant prediction, by petune's names."""


@dataclass(frozen=True)
class Sizes:
    """Images of each dataset; few for `--smoke`."""

    train: int = 500
    test: int = 300
    largest_class: int = 500
    test_of_class: int = 100
    canvases: int = 300
    vtab_train: int = 500
    vtab_test: int = 500

    @property
    def vtab_val(self) -> int:
        """Images of val, a fifth of the training images as in VTAB-1k."""
        return self.vtab_train // 4


SMOKE = Sizes(train=40, test=60, largest_class=50, test_of_class=4, canvases=30, vtab_train=400, vtab_test=100)


def read_images(file: Path, label: str, count: int | None = None) -> tuple[list[Image.Image], list[str]]:
    """Return the first images of a Parquet file in the layout of Hugging Face, and their class names."""
    parquet = pyarrow.parquet.ParquetFile(file)
    features = json.loads(parquet.schema_arrow.metadata[b"huggingface"])["info"]["features"]
    images: list[Image.Image] = []
    names: list[str] = []
    for group in range(parquet.num_row_groups):
        if count is not None and len(images) >= count:
            break
        rows = parquet.read_row_group(group, columns=["img", label]).to_pylist()
        images += [Image.open(io.BytesIO(row["img"]["bytes"])).convert("RGB") for row in rows]
        names += [features[label]["names"][row[label]] for row in rows]
    return images[:count], names[:count]


def unbalanced(source: Path, folder: Path, sizes: Sizes, seed: int) -> Constant:
    """Write class folders of CIFAR-10: 500, 100, 30 and 10 images for training, equally many for testing."""
    images, names = read_images(source / "cifar10" / "train.parquet", "label", 20 * sizes.largest_class)
    generator = np.random.default_rng(seed)
    for name, share in zip(CLASSES, IMBALANCE, strict=True):
        positions = generator.permutation([i for i, other in enumerate(names) if other == name])
        count = round(share * sizes.largest_class)
        save_all(images, positions[:count], folder / "train" / name)
        save_all(images, positions[count:][: sizes.test_of_class], folder / "test" / name)
    share = 1 / len(CLASSES)
    return {"top1": 100 * share, "macro_f1": 100 * share * 2 * share / (1 + share)}


def pairs(source: Path, folder: Path, sizes: Sizes, seed: int) -> Constant:
    """Write a table of two images of CIFAR-10 side by side with both classes."""
    labels = []
    for number, parts in compositions(source, folder, sizes, seed, 2):
        labels.append((number, sorted({name for _, name in parts})))
    write_table(folder, "labels", [(number, "|".join(names)) for number, names in labels], sizes.train)
    tested = [set(names) for number, names in labels if number >= sizes.train]
    shares = np.array([np.mean([name in names for names in tested]) for name in sorted(set.union(*tested))])
    return {"map": 100 * float(shares.mean()), "macro_f1": 100 * float((2 * shares / (1 + shares)).mean())}


def animals(source: Path, folder: Path, sizes: Sizes, seed: int) -> Constant:
    """Write a table of squares of four images of CIFAR-10 with the number of animals among them."""
    counts = []
    for number, parts in compositions(source, folder, sizes, seed, 4):
        counts.append((number, sum(name in ANIMALS for _, name in parts)))
    write_table(folder, "animals", counts, sizes.train)
    values = np.array([count for _, count in counts], np.float64)
    error = values[sizes.train :] - values[: sizes.train].mean()
    return {"mae": float(np.abs(error).mean()), "rmse": float(np.sqrt((error**2).mean())), "r2": 0.0}


def bands(source: Path, folder: Path, sizes: Sizes, seed: int) -> Constant:
    """Write sign digits of 64×64 pixels as NPY arrays of 32×32 with 12 bands of 16 bits: 2×2 pixels × RGB."""
    for split, count in (("train", sizes.train), ("test", sizes.test)):
        images, names = read_images(source / "sign_digits" / f"{split}.parquet", "label")
        chosen = np.random.default_rng(seed).permutation(len(images))[:count]
        for position in chosen.tolist():
            pixels = np.asarray(images[position], np.uint16) * 257
            height, width, _ = pixels.shape
            cells = pixels.reshape(height // 2, 2, width // 2, 2, 3).transpose(0, 2, 1, 3, 4)
            path = folder / split / names[position] / f"{position:05}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, cells.reshape(height // 2, width // 2, 12))
    return {"top1": 10.0}


def vtab(source: Path, folder: Path, sizes: Sizes, seed: int) -> Constant:
    """Write VTAB-1k's layout from CIFAR-100: 800 images for training, 200 for val, the rest for testing."""
    generator = np.random.default_rng(seed)
    lines: dict[str, list[str]] = {}
    numbers: dict[str, int] = {}
    for split, count in (("train", sizes.vtab_train + sizes.vtab_val), ("test", sizes.vtab_test)):
        images, names = read_images(source / "cifar100" / f"{split}.parquet", "fine_label", 20 * count)
        numbers = numbers or {name: number for number, name in enumerate(sorted(set(names)))}
        chosen = balanced(names, count, generator)
        save_all(images, chosen, folder / "images" / split)
        lines[split] = [f"images/{split}/{i:05}.png {numbers[names[i]]}" for i in chosen]
    train, val = lines["train"][: sizes.vtab_train], lines["train"][sizes.vtab_train :]
    lists = {"train800": train, "val200": val, "train800val200": train + val, "test": lines["test"]}
    for name, rows in lists.items():
        (folder / f"{name}.txt").write_text("\n".join(rows) + "\n")
    return {"top1": 1.0}


def canvas(source: Path, folder: Path, sizes: Sizes, seed: int) -> Constant:
    """Write a table of three of scikit-learn's handwritten digits on a dark photo of CIFAR-10, with masks."""
    digits = load_digits()
    photos, _ = read_images(source / "cifar10" / "train.parquet", "label", 2 * sizes.canvases)
    generator = np.random.default_rng(seed)
    rows = []
    pixels = np.zeros(len(DIGITS) + 1)
    for number in range(sizes.canvases):
        image = np.asarray(photos[number].resize((64, 64)), np.float64) * 0.4
        mask = np.zeros((64, 64), np.uint8)
        for digit in generator.integers(len(digits.images), size=3):
            place_digit(image, mask, digits.images[digit], int(digits.target[digit]) + 1, generator)
        save_pair(folder, number, image, mask)
        rows.append((number, f"masks/{number:05}.png"))
        if number >= 0.8 * sizes.canvases:
            pixels += np.bincount(mask.reshape(-1), minlength=len(pixels))
    write_table(folder, "mask", rows, round(0.8 * sizes.canvases))
    share = float(pixels[0] / pixels.sum())
    return {"miou": 100 * share / int((pixels > 0).sum()), "pixel_accuracy": 100 * share}


def place_digit(
    image: NDArray[np.float64],
    mask: NDArray[np.uint8],
    digit: NDArray[np.float64],
    label: int,
    generator: np.random.Generator,
) -> None:
    """Draw a digit of 24×24 pixels somewhere; a later one covers an earlier one."""
    large = np.asarray(Image.fromarray(digit.astype(np.float32)).resize((24, 24), Image.Resampling.BICUBIC))
    ink = large >= INK
    top, left = generator.integers(0, 41, size=2)
    area = (slice(top, top + 24), slice(left, left + 24))
    color = generator.uniform(170, 255, size=3)
    image[area][ink] = (large[ink] / 16).clip(0.5, 1)[:, None] * color
    mask[area][ink] = label


def save_pair(folder: Path, number: int, image: NDArray[np.float64], mask: NDArray[np.uint8]) -> None:
    """Write an image and its mask."""
    for name, array in (("images", image.round().astype(np.uint8)), ("masks", mask)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(folder / name / f"{number:05}.png")


def compositions(
    source: Path, folder: Path, sizes: Sizes, seed: int, cells: int
) -> Iterable[tuple[int, list[tuple[Image.Image, str]]]]:
    """Write images composed of several of CIFAR-10; those for testing come from the test file."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    first = 0
    for split, count in (("train", sizes.train), ("test", sizes.test)):
        images, names = read_images(source / "cifar10" / f"{split}.parquet", "label", cells * count)
        chosen = generator.permutation(len(images)).reshape(count, cells)
        for number, row in enumerate(chosen.tolist(), first):
            compose([images[i] for i in row]).save(folder / "images" / f"{number:05}.png")
            yield number, [(images[i], names[i]) for i in row]
        first += count


def write_table(folder: Path, column: str, rows: Iterable[tuple[int, object]], train: int) -> None:
    """Write `table.csv`: image, target, split; the first images are for training."""
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", column, "split"])
        for number, value in rows:
            writer.writerow([f"images/{number:05}.png", value, "train" if number < train else "test"])


def save_all(images: Sequence[Image.Image], positions: Iterable[int], folder: Path) -> None:
    """Write some images as PNG, named by their positions in the source."""
    folder.mkdir(parents=True, exist_ok=True)
    for position in positions:
        images[position].save(folder / f"{position:05}.png")


def balanced(names: Sequence[str], count: int, generator: np.random.Generator) -> list[int]:
    """Return positions of `count` images, equally many of each class, shuffled so that any first part is mixed."""
    order = generator.permutation(len(names)).tolist()
    turn: dict[int, int] = {}
    seen: dict[str, int] = {}
    for position in order:
        seen[names[position]] = seen.get(names[position], 0) + 1
        turn[position] = seen[names[position]]
    return sorted(order, key=turn.__getitem__)[:count]


MAKERS: dict[str, Callable[[Path, Path, Sizes, int], Constant]] = {
    maker.__name__: maker for maker in (unbalanced, pairs, animals, bands, vtab, canvas)
}


def make_datasets(source: Path, folder: Path, sizes: Sizes, seed: int) -> dict[str, Constant]:
    """Write all datasets, unless they are there with these sizes and of this seed.

    Returns:
        The metrics of constant predictions, by dataset.
    """
    constants = {}
    for name, make in MAKERS.items():
        record = folder / f"{name}.json"
        wanted = {"seed": seed, "sizes": asdict(sizes)}
        before = json.loads(record.read_text()) if record.exists() else None
        if before is None or before | wanted != before or "constant" not in before:
            if before is not None:  # of another seed, other sizes, or stopped in the middle
                shutil.rmtree(folder / name, ignore_errors=True)
            write_json(record, wanted)
            before = wanted | {"constant": make(source, folder / name, sizes, seed)}
            write_json(record, before)
        constants[name] = before["constant"]
    return constants
