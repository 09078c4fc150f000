"""Circles, squares and triangles, drawn by a seed: a dataset with a target for every task.

Legend: N images, S side, C classes.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pydantic import Field

import petune

SHAPES = ("circle", "square", "triangle")
TARGETS = {
    "shape": petune.Target("class", SHAPES),
    "labels": petune.Target("multi_hot", SHAPES),
    "size": petune.Target("number", ("size",)),
    "mask": petune.Target("mask", ("background", *SHAPES)),
}


class ShapesConfig(petune.ReaderConfig):
    """Options of shapes.

    Attributes:
        target: `shape`: the class of the only shape. `labels`: the shapes in the image, one to three. `size`: the width
            of the only shape in pixels. `mask`: the shape of each pixel, 0 for the background.
        count: Number of images.
        side: Side of an image in pixels.
        seed: Draws other images.
    """

    target: Literal["shape", "labels", "size", "mask"] = "shape"
    count: int = Field(600, ge=30)
    side: int = Field(32, ge=16)
    seed: int = Field(0, ge=0)


class Shapes(petune.DatasetReader[ShapesConfig]):
    """Circles, squares and triangles of random size, place and color on a noisy background."""

    about = "drawn circles, squares and triangles: classes, labels, a number or masks"

    def target(self, context: petune.ReadContext) -> petune.Target:
        """Return kind and names of the targets that the option chooses."""
        return TARGETS[self.config.target]

    def load(self, context: petune.ReadContext) -> petune.Dataset:
        """Draw the images; petune cuts a test split and a val split."""
        images, targets = self._draw_all()
        train = petune.Split.of(images, targets)
        empty = train.take(np.arange(0))
        target = self.target(context)
        return petune.Dataset("shapes", target, "drawn by a seed", "none", train, val=empty, test=empty).with_test()

    def _draw_all(self) -> tuple[NDArray[np.uint8], NDArray[Any]]:
        """Return images, uint8 (N, S, S, 3), and their targets."""
        rng = np.random.default_rng(self.config.seed)
        images, targets = [], []
        for index in range(self.config.count):
            how_many = 1 + index // len(SHAPES) % len(SHAPES) if self.config.target == "labels" else 1
            shapes = (index + np.arange(how_many)) % len(SHAPES)
            image, mask, size = self._draw(rng, shapes.tolist())
            images.append(image)
            targets.append(self._target_of(shapes, mask, size))
        dtype = {"shape": np.int64, "size": np.float64}.get(self.config.target, np.uint8)
        return np.stack(images), np.asarray(targets, dtype)

    def _draw(self, rng: np.random.Generator, shapes: list[int]) -> tuple[NDArray[np.uint8], NDArray[np.uint8], int]:
        """Return an image (S, S, 3), its mask (S, S) and the size of the last shape."""
        side = self.config.side
        image = Image.fromarray(rng.integers(0, 90, (side, side, 3), dtype=np.uint8))
        mask = Image.new("L", (side, side))
        size = 0
        for shape in shapes:
            size = int(rng.integers(side // 4, side // 2))
            left, top = rng.integers(0, side - size, 2).tolist()
            color = tuple(rng.integers(120, 256, 3).tolist())
            _draw_shape(ImageDraw.Draw(image), shape, (left, top, size), color)
            _draw_shape(ImageDraw.Draw(mask), shape, (left, top, size), shape + 1)
        return np.asarray(image), np.asarray(mask), size

    def _target_of(self, shapes: NDArray[np.int64], mask: NDArray[np.uint8], size: int) -> Any:
        if self.config.target == "labels":
            return np.isin(np.arange(len(SHAPES)), shapes)
        return {"shape": shapes[0], "size": [size], "mask": mask}[self.config.target]


def _draw_shape(draw: ImageDraw.ImageDraw, shape: int, place: tuple[int, int, int], fill: Any) -> None:
    left, top, size = place
    box = (left, top, left + size, top + size)
    if SHAPES[shape] == "circle":
        draw.ellipse(box, fill)
    elif SHAPES[shape] == "square":
        draw.rectangle(box, fill)
    else:
        draw.polygon([(left, top + size), (left + size, top + size), (left + size // 2, top)], fill)
