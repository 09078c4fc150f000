"""scikit-learn's handwritten digits (UCI, 1998): 1,797 gray 8×8 images that need no download."""

from __future__ import annotations

import numpy as np

from petune.data.dataset import Dataset, Split, Target

MAX_INTENSITY = 16  # the pixels count the ink in 4×4 cells


def load_digits() -> Dataset:
    """Load the digits as 8×8 uint8 RGB images; `Preprocess` scales them to the backbone's input.

    The test split is a fixed, stratified fifth. The suggested augmentation never mirrors, because a mirrored digit is
    not a digit.
    """
    from sklearn import datasets

    bunch = datasets.load_digits()
    gray_NHW = np.rint(bunch.images * (255 / MAX_INTENSITY)).astype(np.uint8)
    images = np.repeat(gray_NHW[..., None], 3, axis=-1)
    split = Split.of(images, bunch.target.astype(np.int64))
    dataset = Dataset(
        name="digits",
        target=Target("class", tuple(str(digit) for digit in bunch.target_names)),
        source="scikit-learn",
        augment="shift",
        train=split,
        val=split.take(np.arange(0)),
        test=split.take(np.arange(0)),
    )
    return dataset.with_test().validated()
