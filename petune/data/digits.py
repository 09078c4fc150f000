"""scikit-learn's handwritten digits (UCI, 1998): 1,797 gray 8×8 images that need no download."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from petune.data.dataset import Dataset, Split, Target

MAX_INTENSITY = 16  # the pixels count the ink in 4×4 cells


def load_digits() -> Dataset:
    """Load the digits as 8×8 uint8 RGB images; `Preprocess` scales them to the backbone's input.

    The test split is a fixed, stratified fifth. The suggested augmentation never mirrors, because a mirrored digit is
    not a digit.
    """
    values = _read()
    gray_NHW = np.rint(values[:, :-1].reshape(-1, 8, 8) * (255 / MAX_INTENSITY)).astype(np.uint8)
    images = np.repeat(gray_NHW[..., None], 3, axis=-1)
    split = Split.of(images, values[:, -1].astype(np.int64))
    dataset = Dataset(
        name="digits",
        target=Target("class", tuple(map(str, range(10)))),
        source="scikit-learn",
        augment="shift",
        train=split,
        val=split.take(np.arange(0)),
        test=split.take(np.arange(0)),
    )
    return dataset.with_test().validated()


def _read() -> NDArray[np.float64]:
    """Return 64 pixels and the digit of each image, (1797, 65).

    scikit-learn is not imported if its file is in its place: that takes 1.5 s, with pandas and SciPy.
    """
    package = find_spec("sklearn")
    file = Path(str(package and package.origin)).parent / "datasets" / "data" / "digits.csv.gz"
    if file.exists():
        return np.loadtxt(file, delimiter=",")
    from sklearn import datasets

    return np.column_stack(datasets.load_digits(return_X_y=True))
