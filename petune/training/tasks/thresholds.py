"""Thresholds on probabilities that give the best F1.

Legend: N images, C classes, T candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_CANDIDATES = 4096
DEFAULT = 0.5


def choose_thresholds(probabilities_NC: Tensor, targets_NC: Tensor, *, per_class: bool) -> list[float]:
    """Return a threshold for each class; a label is predicted if its probability is at least that.

    Args:
        probabilities_NC: float64.
        targets_NC: 0 or 1.
        per_class: Choose the best F1 of each class; otherwise one threshold with the best macro-F1, which overfits
            less on few images. A class without positives takes the common one.
    """
    num_classes = targets_NC.shape[1]
    present = [c for c in range(num_classes) if bool(targets_NC[:, c].any())]
    if not present:
        return [DEFAULT] * num_classes
    common = _best(probabilities_NC[:, present], targets_NC[:, present])
    if not per_class:
        return [common] * num_classes
    return [_best(probabilities_NC[:, [c]], targets_NC[:, [c]]) if c in present else common for c in range(num_classes)]


def _best(probabilities_NC: Tensor, targets_NC: Tensor) -> float:
    """Return the threshold with the best mean F1 of the classes; of equal ones the nearest to 0.5."""
    candidates_T = _candidates(probabilities_NC, targets_NC)
    candidates_T = candidates_T[(candidates_T - DEFAULT).abs().argsort(stable=True)]
    mean_T = torch.zeros_like(candidates_T)
    for probabilities_N, targets_N in zip(probabilities_NC.T, targets_NC.T, strict=True):
        mean_T += _f1_at(candidates_T, probabilities_N, targets_N.bool())
    return float(candidates_T[mean_T.argmax()])


def _candidates(probabilities_NC: Tensor, targets_NC: Tensor) -> Tensor:
    """Return the midpoints below each positive: a lower threshold is only better if it reaches another positive."""
    values = torch.cat([probabilities_NC.new_zeros(1), torch.unique(probabilities_NC)])
    positives = torch.unique(probabilities_NC[targets_NC.bool()])
    steps = torch.linspace(0, len(positives) - 1, min(len(positives), MAX_CANDIDATES)).round().long()
    position = torch.searchsorted(values[1:].contiguous(), positives[steps])
    return (values[position] + values[position + 1]) / 2


def _f1_at(candidates_T: Tensor, probabilities_N: Tensor, is_positive_N: Tensor) -> Tensor:
    """Return the F1 of one class at each candidate, (T,)."""
    every, positive = probabilities_N.sort().values, probabilities_N[is_positive_N].sort().values
    predicted_T = len(every) - torch.searchsorted(every, candidates_T)
    correct_T = len(positive) - torch.searchsorted(positive, candidates_T)
    return 2 * correct_T / (predicted_T + len(positive))
