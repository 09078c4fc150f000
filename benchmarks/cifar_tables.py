"""Tables made of CIFAR-10's real images: pairs side by side with two labels, and squares of four with a number.

    python benchmarks/cifar_tables.py runs/tables --count 3000 --seed 0

writes `pairs.csv` (image, labels) and `animals.csv` (image, animals), each with a folder of 64×64 PNG files.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet
from PIL import Image

ANIMALS = {"bird", "cat", "deer", "dog", "frog", "horse"}
PARQUET = Path(__file__).resolve().parents[2] / "shared" / "data" / "cifar10" / "train.parquet"


def read_cifar(path: Path, count: int) -> tuple[list[Image.Image], list[str]]:
    """Return the first images of a Parquet file and their class names."""
    file = pyarrow.parquet.ParquetFile(path)
    features = json.loads(file.schema_arrow.metadata[b"huggingface"])["info"]["features"]
    images: list[Image.Image] = []
    names: list[str] = []
    for group in range(file.num_row_groups):
        if len(images) >= count:
            break
        rows = file.read_row_group(group).to_pylist()
        images += [Image.open(io.BytesIO(row["img"]["bytes"])).convert("RGB") for row in rows]
        names += [features["label"]["names"][row["label"]] for row in rows]
    return images, names


def write_tables(images: list[Image.Image], names: list[str], output: Path, count: int, seed: int) -> None:
    """Write both tables; each image of CIFAR-10 is drawn without replacement as long as there are enough."""
    generator = np.random.default_rng(seed)
    for table, column, cells in (("pairs", "labels", 2), ("animals", "animals", 4)):
        folder = output / table
        folder.mkdir(parents=True, exist_ok=True)
        chosen = np.resize(generator.permutation(len(images)), (count, cells))
        with (output / f"{table}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["image", column])
            for number, row in enumerate(chosen):
                path = folder / f"{number:05}.png"
                compose([images[i] for i in row]).save(path)
                labels = [names[i] for i in row]
                is_animal = [label in ANIMALS for label in labels]
                value = "|".join(sorted(set(labels))) if cells == 2 else str(sum(is_animal))
                writer.writerow([path.relative_to(output).as_posix(), value])


def compose(parts: list[Image.Image]) -> Image.Image:
    """Return two images side by side, stretched to the full height, or four in a square."""
    canvas = Image.new("RGB", (64, 64))
    height = 64 if len(parts) == 2 else 32
    for number, part in enumerate(parts):
        canvas.paste(part.resize((32, height), Image.Resampling.BICUBIC), (32 * (number % 2), 32 * (number // 2)))
    return canvas


def main() -> None:
    """Write the tables that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--count", type=int, default=3000, help="images of each table")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parquet", type=Path, default=PARQUET, help="CIFAR-10 in the Hugging Face layout")
    args = parser.parse_args()
    images, names = read_cifar(args.parquet, 4 * args.count)
    write_tables(images, names, args.output, args.count, args.seed)


if __name__ == "__main__":
    main()
