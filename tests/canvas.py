"""Digits of scikit-learn on a canvas, with masks: PNG files and a table of them."""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

NAMES = ("background", "zero", "one")
digits = cache(load_digits)


def write_canvases(folder: Path, count: int = 48, height: int = 32, width: int = 32) -> str:
    """Write canvases with two digits each, 0 or 1, and their masks; return the dataset `table:…` of them."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    chosen = np.flatnonzero(digits().target < len(NAMES) - 1)
    rows = []
    for i in range(count):
        image, mask = np.zeros((height, width), np.uint8), np.zeros((height, width), np.uint8)
        for number in rng.choice(chosen, 2):
            side = int(rng.integers(12, 20))
            pixels = Image.fromarray((digits().images[number] * 15.9).astype(np.uint8)).resize((side, side))
            top, left = rng.integers(0, height - side), rng.integers(0, width - side)
            image[top : top + side, left : left + side] = np.asarray(pixels)
            mask[top : top + side, left : left + side] = (np.asarray(pixels) > 80) * (digits().target[number] + 1)
        rows.append({"image": f"{i}.png", "mask": f"{i}-mask.png"})
        Image.fromarray(image).convert("RGB").save(folder / rows[-1]["image"])
        Image.fromarray(mask).save(folder / rows[-1]["mask"])
    with (folder / "canvas.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["image", "mask"])
        writer.writeheader()
        writer.writerows(rows)
    return f"table:{folder / 'canvas.csv'},classes=[{','.join(NAMES)}]"
