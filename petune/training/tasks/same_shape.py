"""Outputs and targets of the same shape: tensors of other shapes would be broadcast without a word."""

from __future__ import annotations

from torch import Tensor

from petune.base.errors import DataError


def check_same_shape(outputs: Tensor, targets: Tensor) -> None:
    """Check that there is one output for each target.

    Raises:
        DataError: The shapes differ.
    """
    if outputs.shape != targets.shape:
        raise DataError(
            f"the model returns outputs of shape {tuple(outputs.shape)} for targets of shape {tuple(targets.shape)}. "
            "They must be equal: (images, names of the targets)"
        )
