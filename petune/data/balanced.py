"""Draw the images of an epoch so that every class comes equally often; a function of (seed, epoch).

Legend: N images of the training split, and as many draws of an epoch; C classes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Positions = NDArray[np.int64]


def balanced_order(seed: int, epoch: int, labels_N: Positions) -> Positions:
    """Return the positions of N draws in random order; the numbers of draws per class differ by at most one.

    An image of a class comes again only after all others of the class did. Which classes get the one draw more, and
    which images of a large class are left out, differs from epoch to epoch.

    Args:
        seed: The run's seed.
        epoch: Number of the epoch, from 0.
        labels_N: Class of each image. Classes without images are not drawn.
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch << 8 | 2]))
    classes = generator.permutation(np.unique(labels_N))
    share, rest = divmod(len(labels_N), len(classes))
    drawn = [
        _draw(generator, np.flatnonzero(labels_N == label), share + (number < rest))
        for number, label in enumerate(classes)
    ]
    return generator.permutation(np.concatenate(drawn))


def _draw(generator: np.random.Generator, positions: Positions, count: int) -> Positions:
    passes = -(-count // len(positions))
    return np.concatenate([generator.permutation(positions) for _ in range(passes)])[:count]
