"""Real handwritten digits of scikit-learn on dark canvases, with masks of which digit each pixel belongs to.

    python benchmarks/digit_canvases.py runs/canvases --count 400

writes `canvases.csv` (image, mask), PNG files of both, and prints the dataset's name. Class 0 is the background.
"""

from __future__ import annotations

import argparse
import csv
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

NAMES = ("background", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
INK = 80  # least brightness, of 255, of a pixel that belongs to a digit
digits = cache(load_digits)


def write_canvases(
    folder: Path, count: int = 400, height: int = 32, width: int = 32, classes: int = 3, seed: int = 0
) -> str:
    """Write canvases with two digits each and their masks; return the name of the dataset.

    Args:
        folder: Where to.
        count: Number of canvases.
        height: Pixels.
        width: Pixels.
        classes: Number of classes, the background among them: 3 has the digits 0 and 1.
        seed: Of the choice and the places of the digits.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    chosen = np.flatnonzero(digits().target < classes - 1)
    rows = []
    for i in range(count):
        image, mask = np.zeros((height, width), np.uint8), np.zeros((height, width), np.uint8)
        for number in rng.choice(chosen, 2):
            side = int(rng.integers(12, 20))
            pixels = Image.fromarray((digits().images[number] * 15.9).astype(np.uint8)).resize((side, side))
            top, left = rng.integers(0, height - side), rng.integers(0, width - side)
            image[top : top + side, left : left + side] = np.asarray(pixels)
            mask[top : top + side, left : left + side] = (np.asarray(pixels) > INK) * (digits().target[number] + 1)
        rows.append({"image": f"{i}.png", "mask": f"{i}-mask.png"})
        Image.fromarray(image).convert("RGB").save(folder / rows[-1]["image"])
        Image.fromarray(mask).save(folder / rows[-1]["mask"])
    with (folder / "canvases.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["image", "mask"])
        writer.writeheader()
        writer.writerows(rows)
    return f"table:{folder / 'canvases.csv'},classes=[{','.join(NAMES[:classes])}]"


def main() -> None:
    """Write the canvases that the arguments describe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--classes", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(write_canvases(arguments.folder, arguments.count, classes=arguments.classes, seed=arguments.seed))


if __name__ == "__main__":
    main()
