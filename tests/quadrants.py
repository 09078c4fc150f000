"""The dataset `quadrants` of a made-up plugin: scikit-learn's real digits in the four quarters of an image."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

import petune
from petune.data.digits import load_digits

DIGITS = 4
SIDE = 16


class QuadrantsConfig(petune.ReaderConfig):
    """Options.

    Attributes:
        targets: `labels`: the digits in the image. `number`: how many there are. `numbers`: their number and their sum.
        count: Images.
        wrong: Put NaN, or the same number everywhere, among the numbers.
    """

    targets: Literal["labels", "number", "numbers"] = "labels"
    count: int = 120
    wrong: Literal["", "missing", "constant"] = ""


class Quadrants(petune.DatasetReader[QuadrantsConfig]):
    """Up to four digits from 0 to 3."""

    about = "digits in four quarters, 16x16"

    def load(self, context: petune.ReadContext) -> petune.Dataset:
        """Draw the images; always the same ones."""
        digits = load_digits().train
        generator = np.random.default_rng(0)
        chosen = generator.choice(np.flatnonzero(digits.targets < DIGITS), (self.config.count, 4))
        chosen[generator.random(chosen.shape) < 0.4] = -1
        images = np.zeros((self.config.count, SIDE, SIDE, 3), np.uint8)
        for image, row in zip(images, chosen, strict=True):
            for quarter, position in enumerate(row.tolist()):
                if position >= 0:
                    top, left = 8 * (quarter // 2), 8 * (quarter % 2)
                    image[top : top + 8, left : left + 8] = digits.images[digits.rows[position]]
        labels = np.where(chosen < 0, -1, digits.targets[chosen])
        train = petune.Split.of(images, self._targets(labels))
        empty = train.take(np.arange(0))
        return petune.Dataset("quadrants", self.target(context), "made here", "none", train, empty, empty).with_test()

    def target(self, context: petune.ReadContext) -> petune.Target:
        """Return the names of digits or numbers."""
        if self.config.targets == "labels":
            return petune.Target("multi_hot", ("zero", "one", "two", "three"))
        return petune.Target("number", ("count", "sum")[: 1 if self.config.targets == "number" else 2])

    def _targets(self, labels: Any) -> Any:
        present = np.stack([(labels == digit).any(1) for digit in range(DIGITS)], 1).astype(np.uint8)
        if self.config.targets == "labels":
            return present
        numbers = np.stack([(labels >= 0).sum(1), np.maximum(labels, 0).sum(1)], 1).astype(np.float64)
        if self.config.wrong == "constant":
            numbers[:] = 7
        if self.config.wrong == "missing":
            numbers[5, 0] = np.nan
        return numbers[:, :1] if self.config.targets == "number" else numbers
