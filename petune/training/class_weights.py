"""Weights of classes in the loss, scaled to a mean of 1 over the training images.

Legend: N images, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from petune.base.errors import ConfigError, DataError, did_you_mean
from petune.data.dataset import Split
from petune.data.target import Target

ClassWeights = str | Mapping[str, float]


def fit_class_weights(weighting: ClassWeights, beta: float, train: Split, target: Target) -> dict[str, float] | None:
    """Return the weight of each class by name; None if classes are not weighted.

    Args:
        weighting: `none`, `inverse`, `effective`, or a table of names in which a missing class counts 1.
        beta: Of `effective`.
        train: The training split.
        target: Names of its classes.

    Raises:
        ConfigError: A table names an unknown class, or gives every training image the weight 0.
        DataError: A class has no training images, so it cannot be weighted by their number.
    """
    if weighting == "none":
        return None
    counts_C = np.bincount(train.targets, minlength=len(target.names))
    if isinstance(weighting, str):
        empty = target.absent(train.targets)
        if empty:
            raise DataError(
                f"class_weights={weighting} needs training images of every class, but {', '.join(empty)} has none. "
                "Add some, or use class_weights=none"
            )
        weight_C = 1 / counts_C if weighting == "inverse" else 1 / _effective_number(counts_C, beta)
    else:
        weight_C = _from_table(weighting, target)
    mean = (weight_C * counts_C).sum() / counts_C.sum()
    if not mean > 0:
        raise ConfigError("class_weights gives every training image the weight 0. Give a class a weight above 0")
    return dict(zip(target.names, (weight_C / mean).tolist(), strict=True))


def _effective_number(counts_C: NDArray[np.int64], beta: float) -> NDArray[np.float64]:
    """Return (1 - beta^n) / (1 - beta): n images overlap, so further ones add less and less."""
    return np.asarray((1 - np.power(beta, counts_C)) / (1 - beta))


def _from_table(table: Mapping[str, float], target: Target) -> NDArray[np.float64]:
    for name in table:
        if name not in target.names:
            raise ConfigError(
                f"class_weights names {name!r}, which is no class of the dataset{did_you_mean(name, target.names)}"
            )
    return np.array([table.get(name, 1.0) for name in target.names])
