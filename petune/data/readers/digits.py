"""The dataset `digits`."""

from __future__ import annotations

from pathlib import Path

from petune.data.dataset import Dataset, Target
from petune.data.digits import load_digits
from petune.data.reader import DatasetReader, ReadContext, ReaderConfig


class DigitsReader(DatasetReader[ReaderConfig]):
    """scikit-learn's handwritten digits."""

    about = "scikit-learn's 1,797 handwritten digits, 8x8, no download"

    def load(self, context: ReadContext) -> Dataset:
        """Read them from scikit-learn."""
        return load_digits()

    def target(self, context: ReadContext) -> Target:
        """Return the ten digits."""
        return Target("class", tuple(map(str, range(10))))

    def find(self, data_dir: Path | None) -> str | None:
        """Return scikit-learn, which has them inside."""
        return "scikit-learn"
