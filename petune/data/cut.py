"""Divide samples: by a share for val and test, by a number of shots. Groups and copies never part.

Stratified by class, by combination of labels, by quantile of numbers; masks are not stratified.

Legend: N samples, U units (samples that stay together).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from petune.data.target import TargetKind

Positions = NDArray[np.int64]
MAX_QUANTILES = 10


@dataclass(frozen=True)
class Samples:
    """Samples, as far as dividing them is concerned.

    Attributes:
        kind: Kind of the targets.
        targets: See `Target`; not used for masks.
        rows: int64 (N,); copies of an image have equal rows. Testing on a copy of a training image would measure
            memorization.
        groups: int64 (N,) or None; samples of one group, such as a patient or a video, stay together.
    """

    kind: TargetKind
    targets: NDArray[Any]
    rows: Positions
    groups: Positions | None = None

    def units(self) -> Positions:
        """Return the unit of each sample, int64 (N,)."""
        return _units(self)[0]


def held_out(samples: Samples, fraction: float, seed: int) -> NDArray[np.bool_]:
    """Select a share of each stratum: at least one unit, and never all of them.

    A class or label with a single image keeps it.

    Args:
        samples: The samples.
        fraction: Share of each stratum.
        seed: Selects the samples; the same seed always selects the same ones.

    Returns:
        Mask, bool (N,).
    """
    unit_N, size_U = _units(samples)
    stratum_U = _strata_of_units(samples, unit_N, math.ceil(1 / fraction))
    selected_U = np.zeros(len(size_U), dtype=bool)
    for order in shuffled_by(stratum_U, seed):
        selected_U[_first_share(order, size_U, fraction)] = True
    for unit_M in _units_of_labels(samples, unit_N):
        if selected_U[unit_M].all():  # the strata of combinations, and of groups, hold several labels
            selected_U[unit_M[size_U[unit_M].argmin()]] = False
    return selected_U[unit_N]


def draw_shots(samples: Samples, count: int, seed: int) -> Positions:
    """Return the positions of `count` samples of each class, drawn by `seed`, in order."""
    if samples.kind == "class":
        chosen = [order[:count] for order in shuffled_by(samples.targets, seed)]
    else:
        generator = _generator(seed)
        labels = samples.targets.T
        chosen = [generator.permutation(np.flatnonzero(label))[:count] for label in labels]
    return np.unique(np.concatenate(chosen))


def fold_numbers(samples: Samples, folds: int, seed: int) -> Positions:
    """Return the fold of each sample, from 0: scikit-learn's stratified folds, in which groups and copies never part.

    Args:
        samples: The samples.
        folds: How many.
        seed: Selects the samples; the same seed always selects the same ones.
    """
    import warnings

    from sklearn.model_selection import StratifiedGroupKFold

    unit_N, size_U = _units(samples)
    fold_N = np.full(len(unit_N), -1, np.int64)
    if len(size_U) < folds:
        return fold_N
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it counts members, not groups: `fold_of` checks every class of every fold
        for number, (_, rows) in enumerate(splitter.split(unit_N, _strata(samples, folds), unit_N)):
            fold_N[rows] = number
    return fold_N


def shuffled_by(strata: Positions, seed: int) -> Iterator[Positions]:
    """Yield the positions of each stratum in random order, strata in ascending order."""
    generator = _generator(seed)
    for stratum in np.unique(strata):
        yield generator.permutation(np.flatnonzero(strata == stratum))


def _generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, 0x5EED]))


def _first_share(order: Positions, size_U: Positions, fraction: float) -> list[int]:
    """Take units in order while this brings their number of images nearer to the share."""
    if len(order) < 2:
        return []
    wanted = round(int(size_U[order].sum()) * fraction)
    chosen: list[int] = []
    total = 0
    for unit in order.tolist():
        size = int(size_U[unit])
        if abs(total + size - wanted) < abs(total - wanted):
            chosen.append(unit)
            total += size
    if not chosen:
        return [int(order[np.argmin(size_U[order])])]
    return chosen[:-1] if len(chosen) == len(order) else chosen


def _units(samples: Samples) -> tuple[Positions, Positions]:
    """Return the unit of each sample, (N,), and the number of different images in each unit, (U,)."""
    _, row_N = np.unique(samples.rows, return_inverse=True)
    if samples.groups is None:
        return row_N, np.ones(row_N.max(initial=-1) + 1, np.int64)
    _, group_N = np.unique(samples.groups, return_inverse=True)
    joined_N = _smallest_of(group_N, row_N)
    while not np.array_equal(joined_N, spread_N := _smallest_of(_smallest_of(joined_N, group_N), row_N)):
        joined_N = spread_N  # a copy may join two groups
    _, unit_N = np.unique(joined_N, return_inverse=True)
    _, first_of_row = np.unique(row_N, return_index=True)
    return unit_N, np.bincount(unit_N[first_of_row])


def _units_of_labels(samples: Samples, unit_N: Positions) -> Iterator[Positions]:
    """Yield the units with each class or label that any sample has."""
    if samples.kind == "class":
        labels = [samples.targets == label for label in np.unique(samples.targets)]
    else:
        labels = list(samples.targets.T > 0) if samples.kind == "multi_hot" else []
    for has_label_N in labels:
        if has_label_N.any():
            yield np.unique(unit_N[has_label_N])


def _smallest_of(values_N: Positions, members_N: Positions) -> Positions:
    """Return for each sample the smallest value of all samples with the same member number."""
    smallest = np.full(members_N.max(initial=-1) + 1, len(values_N), np.int64)
    np.minimum.at(smallest, members_N, values_N)
    return smallest[members_N]


def _strata_of_units(samples: Samples, unit_N: Positions, smallest: int) -> Positions:
    """Return the stratum of each unit: that of its first sample, or the rarest one in a group."""
    stratum_N = _strata(samples, smallest)
    _, first_U = np.unique(unit_N, return_index=True)
    if samples.groups is None:
        return stratum_N[first_U]
    pairs = np.unique(np.stack([unit_N, stratum_N], 1), axis=0)
    _, inverse, counts = np.unique(pairs[:, 1], return_inverse=True, return_counts=True)
    order = np.lexsort((counts[inverse], pairs[:, 0]))
    _, first = np.unique(pairs[order, 0], return_index=True)
    return np.asarray(pairs[order, 1][first], np.int64)


def _strata(samples: Samples, smallest: int) -> Positions:
    if samples.kind == "class":
        return np.asarray(samples.targets, np.int64)
    if samples.kind == "multi_hot":
        return _label_strata(samples.targets, smallest)
    if samples.kind == "number":
        return _quantiles(samples.targets, smallest)
    return np.zeros(len(samples.rows), np.int64)


def _label_strata(targets_NC: NDArray[Any], smallest: int) -> Positions:
    """Return the combination of labels of each sample; rare ones count by their rarest label, or as one stratum."""
    _, combination_N = np.unique(targets_NC, axis=0, return_inverse=True)
    combination_N = combination_N.reshape(-1)
    frequency_C = targets_NC.sum(0, dtype=np.int64)
    frequencies_NC = np.where(targets_NC > 0, frequency_C, len(targets_NC) + 1)
    rarest_N = np.where(targets_NC.any(1), frequencies_NC.argmin(1), targets_NC.shape[1])
    strata = np.where(_counts_of(combination_N) < smallest, combination_N.max(initial=-1) + 1 + rarest_N, combination_N)
    return np.where(_counts_of(strata) < smallest, -1, strata)


def _counts_of(strata: Positions) -> Positions:
    _, inverse, counts = np.unique(strata, return_inverse=True, return_counts=True)
    return counts[inverse]


def _quantiles(targets_NK: NDArray[Any], smallest: int) -> Positions:
    """Return the quantile of each sample; of several numbers, that of the mean of the standardized numbers."""
    with np.errstate(over="ignore"):  # tasks refuse numbers of such a size
        scale_K = targets_NK.std(0)
    value_N = ((targets_NK - targets_NK.mean(0)) / np.where(scale_K > 0, scale_K, 1)).mean(1)
    number = max(1, min(MAX_QUANTILES, len(value_N) // smallest))
    rank_N = np.argsort(np.argsort(value_N, kind="stable"), kind="stable")
    return rank_N * number // max(1, len(value_N))
