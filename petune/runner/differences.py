"""Differences between methods: which are more than the chance of seeds and of test images.

Legend: S seeds, N test images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from petune.base.config import Config

CONFIDENCE = 0.95


class Difference(Config):
    """The difference of a method to a reference in the main metric, on test.

    Attributes:
        reference: The method that it is compared with.
        mean: Value of the method minus that of the reference, the mean over the seeds that both have.
        low, high: Bounds of the interval, see `difference`; None if one seed is all there is, without values of each
            image, or if several seeds differ by exactly the same.
        over_images: Whether the interval allows for the choice of test images, besides that of seeds.
        num_seeds: How many seeds both have; an interval of one seed allows for test images only.
    """

    reference: str
    mean: float
    low: float | None = None
    high: float | None = None
    over_images: bool = False
    num_seeds: int = 0

    @property
    def is_clear(self) -> bool | None:
        """True if the interval leaves out 0; None without an interval."""
        return None if self.low is None or self.high is None else not self.low <= 0 <= self.high


@dataclass(frozen=True)
class SeedValue:
    """The main metric of one run on test.

    Attributes:
        value: Of the whole test split.
        images_N: Values of the images, whose mean is `value`; None if there are none.
    """

    value: float
    images_N: NDArray[np.float32] | None = None


Values = Mapping[int, SeedValue]
"""Of the runs of a method, by seed."""


def differences_to(reference: str, values: Mapping[str, Values], *, is_chosen: bool = False) -> dict[str, Difference]:
    """Compare every method with a reference, with intervals that hold together: see `difference`.

    Args:
        reference: A method.
        values: Of all methods.
        is_chosen: The reference is the best one in `values`. Any two methods may then be those that are compared, and
            intervals that hold for all pairs hold for these.
    """
    others = [method for method in values if method != reference]
    count = num_comparisons(len(values), is_chosen=is_chosen)
    found = {m: difference(reference, values[m], values[reference], count) for m in others}
    return {method: one for method, one in found.items() if one is not None}


def num_comparisons(num_methods: int, *, is_chosen: bool) -> int:
    """Return how many differences the intervals of a table hold for together; see `differences_to`."""
    return math.comb(num_methods, 2) if is_chosen else num_methods - 1


def difference(reference: str, own: Values, base: Values, count: int = 1) -> Difference | None:
    """Compare two methods on the seeds that both have; None if there are none.

    Runs of the same seed and images of the same test split are paired. The interval is Student's: its variance is that
    of seeds and images drawn independently of each other (two-way random effects), its degrees of freedom are
    Satterthwaite's. With few seeds it is wide, as it should be. Bonferroni's correction makes several intervals hold
    together with 95 %.

    Args:
        reference: Name of the method that `base` is of.
        own, base: By seed.
        count: How many comparisons the interval holds together with, this one among them.
    """
    seeds = sorted(own.keys() & base.keys())
    if not seeds:
        return None
    delta_S = np.array([own[seed].value - base[seed].value for seed in seeds])
    mean = float(delta_S.mean())
    delta_SN = _by_image([(own[seed], base[seed]) for seed in seeds])
    parts = _variance_parts(delta_S, delta_SN)
    half = _half_width(parts, 1 - (1 - CONFIDENCE) / count)
    if not parts or (half == 0 and mean != 0):  # a few equal differences do not show how much they vary
        return Difference(reference=reference, mean=mean, num_seeds=len(seeds))
    return Difference(
        reference=reference,
        mean=mean,
        low=mean - half,
        high=mean + half,
        over_images=delta_SN is not None,
        num_seeds=len(seeds),
    )


def _by_image(pairs: Sequence[tuple[SeedValue, SeedValue]]) -> NDArray[np.float64] | None:
    """Return the differences of the images, (S, N); None if a run has no values, or another number of images."""
    arrays = [value.images_N for pair in pairs for value in pair]
    present = [array for array in arrays if array is not None]
    if len(present) < len(arrays) or len({array.shape for array in present}) > 1 or len(present[0]) < 2:
        return None
    return np.stack([present[i].astype(np.float64) - present[i + 1] for i in range(0, len(present), 2)])


def _variance_parts(delta_S: NDArray[np.float64], delta_SN: NDArray[np.float64] | None) -> list[tuple[float, int]]:
    """Return the parts of the variance of the mean difference, each with its degrees of freedom."""
    parts = []
    if len(delta_S) > 1:
        parts.append((float(delta_S.var(ddof=1)) / len(delta_S), len(delta_S) - 1))
    if delta_SN is not None:
        num_seeds, num_images = delta_SN.shape
        of_images = float(delta_SN.mean(0).var(ddof=1)) / num_images
        if num_seeds > 1:  # what neither seed nor image explains is in both parts: count it once
            rest_SN = delta_SN - delta_SN.mean(0) - delta_SN.mean(1, keepdims=True) + delta_SN.mean()
            rest = float((rest_SN**2).sum()) / ((num_seeds - 1) * (num_images - 1)) / delta_SN.size
            of_images = max(0.0, of_images - rest)
        parts.append((of_images, num_images - 1))
    return parts


def _half_width(parts: Sequence[tuple[float, int]], confidence: float) -> float:
    from scipy.stats import t

    variance = sum(part for part, _ in parts)
    if variance == 0:
        return 0.0
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts)
    return float(t.ppf((1 + confidence) / 2, freedom)) * math.sqrt(variance)
