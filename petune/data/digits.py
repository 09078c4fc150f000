"""scikit-learn's handwritten digits (UCI, 1998): 1,797 grey 8×8 images that need no download."""

from __future__ import annotations

import numpy as np

from petune.data.dataset import Dataset, Split, stratified

TEST_FRACTION = 0.2
BRIGHTEST = 16  # the images count ink in 4×4 cells, so they go from 0 to 16


def load_digits() -> Dataset:
    """Load the digits at their own 8×8 pixels, uint8 RGB; `Preprocess` brings them to the backbone's size.

    The test split is a stratified fifth, always the same. Nothing is mirrored: a mirrored digit is none.
    """
    from sklearn import datasets

    bunch = datasets.load_digits()
    grey_NHW = np.rint(bunch.images * (255 / BRIGHTEST)).astype(np.uint8)
    images = np.repeat(grey_NHW[..., None], 3, axis=-1)
    everything = Split.of(images, bunch.target.astype(np.int64))
    in_test = stratified(everything.labels, everything.rows, TEST_FRACTION, seed=0)
    return Dataset(
        name="digits",
        classes=tuple(str(digit) for digit in bunch.target_names),
        source="scikit-learn",
        augment="shift",
        train=everything.take(np.flatnonzero(~in_test)),
        val=everything.take(np.arange(0)),
        test=everything.take(np.flatnonzero(in_test)),
    ).checked()
