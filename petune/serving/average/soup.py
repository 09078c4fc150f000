"""Combine the values of adapters: what is tuned by the algorithm, classifiers and buffers by their mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from petune.adapters.average import add_task_vectors, combine_buffers, dare, interpolate, ties, weighted_sum
from petune.adapters.lora_products import Factors, factored, lora_tensors, sum_of_factors
from petune.base.errors import UnknownName, UsageError
from petune.base.text import plural

Algorithm = Literal["uniform", "greedy", "task_arithmetic", "ties", "dare", "wise_ft"]
COEFFICIENTS: dict[Algorithm, float] = {"task_arithmetic": 0.4, "ties": 1.0, "dare": 0.4, "wise_ft": 0.5}
"""Defaults: those that the papers recommend without validation data; of WiSE-FT the middle."""
DENSITIES: dict[Algorithm, float] = {"ties": 0.2, "dare": 0.1}
"""Share of each task vector that is kept: the papers' top 20 % and drop rate 0.9."""
SEVERAL: set[Algorithm] = {"uniform", "greedy", "ties"}
"""Algorithms that need two adapters or more."""
ONE_COEFFICIENT: set[Algorithm] = {"ties", "wise_ft"}


@dataclass(frozen=True)
class Mixture:
    """The way in which adapters are combined.

    Attributes:
        algorithm: The algorithm.
        coefficients: One for each adapter, as the algorithm uses them; see `petune.average_adapters`.
        shares: One for each adapter, of sum 1: for classifiers and buffers.
        density: Share of each task vector that TIES and DARE keep.
        seed: Of DARE.
    """

    algorithm: Algorithm
    coefficients: tuple[float, ...]
    shares: tuple[float, ...]
    density: float = 1.0
    seed: int = 0

    @property
    def needs_start(self) -> bool:
        """True for algorithms of task vectors."""
        return self.algorithm in COEFFICIENTS

    def values(self, adapters: Sequence[Mapping[str, Tensor]], start: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Combine tuned tensors value by value.

        Args:
            adapters: θ_i.
            start: θ_0; empty for algorithms that need none.
        """
        if self.algorithm == "task_arithmetic":
            return add_task_vectors(start, adapters, self.coefficients)
        if self.algorithm == "ties":
            return ties(start, adapters, self.coefficients[0], self.density)
        if self.algorithm == "dare":
            return dare(start, adapters, self.coefficients, self.density, self.seed)
        mean = weighted_sum(adapters, self.shares)
        return interpolate(start, mean, self.coefficients[0]) if self.algorithm == "wise_ft" else mean

    def products(
        self, adapters: Sequence[Mapping[str, Factors]], start: Mapping[str, Factors] | None
    ) -> Mapping[str, Factors | Tensor]:
        """Combine the changes of weights that LoRA adapters are.

        Args:
            adapters: The factors of each.
            start: Those of the adapter that the runs continue; None if they started from the backbone, with no change.
        """
        if self.algorithm in {"ties", "dare"}:
            changes = [{layer: f.product() for layer, f in adapter.items()} for adapter in adapters]
            zeros = {layer: change * 0 for layer, change in changes[0].items()}
            first = zeros if start is None else {layer: f.product() for layer, f in start.items()}
            return self.values(changes, first)
        coefficients = self.coefficients if self.algorithm == "task_arithmetic" else self.shares
        if self.algorithm == "wise_ft":
            coefficients = tuple(self.coefficients[0] * share for share in self.shares)
        if start is None:
            return sum_of_factors(adapters, coefficients)
        return sum_of_factors([*adapters, start], [*coefficients, 1 - sum(coefficients)])

    def others(self, adapters: Sequence[Mapping[str, Tensor]], buffers: set[str]) -> dict[str, Tensor]:
        """Combine classifiers and buffers.

        Args:
            adapters: Their tensors, without the tuned ones.
            buffers: The keys of those that do not train.
        """
        of_buffers = combine_buffers([{key: a[key] for key in a if key in buffers} for a in adapters], self.shares)
        heads = [{key: a[key] for key in a if key not in buffers} for a in adapters]
        return {**weighted_sum(heads, self.shares), **of_buffers}


def mixture_of(
    algorithm: str, count: int, coefficients: Sequence[float] | None, density: float | None, seed: int
) -> Mixture:
    """Return how adapters are combined, with the algorithm's defaults filled in.

    Args:
        algorithm: Its name.
        count: How many adapters there are.
        coefficients, density, seed: See `petune.average_adapters`.

    Raises:
        UnknownName: There is no such algorithm.
        UsageError: A number is out of range, or the algorithm does not use it.
    """
    if algorithm not in get_args(Algorithm):
        raise UnknownName("algorithm", algorithm, get_args(Algorithm))
    name: Algorithm = algorithm  # type: ignore[assignment]
    _check_density(name, density)
    if not -(2**63) <= seed < 2**63:
        raise UsageError(f"seed is {seed}. Use a number of at most 64 bits")
    given = _checked_coefficients(name, count, coefficients)
    equal = (1 / count,) * count
    shares = _of_sum_one(given) if name == "uniform" else equal
    return Mixture(name, given, shares, DENSITIES.get(name, 1.0) if density is None else density, seed)


def _checked_coefficients(name: Algorithm, count: int, given: Sequence[float] | None) -> tuple[float, ...]:
    needed = 1 if name in ONE_COEFFICIENT else count
    if given is None:
        return (COEFFICIENTS.get(name, 1.0),) * needed
    if name == "greedy":
        raise UsageError("greedy averages what it chooses with equal weights. Leave coefficients out")
    values = _finite(given)
    if len(values) == 1:
        values *= needed
    if len(values) != needed:
        raise UsageError(
            f"{plural(len(values), 'coefficient')} for {plural(needed, 'value')} of {name}. Give {needed}, or one"
        )
    if name == "uniform" and not (min(values) >= 0 and max(values) > 0):
        raise UsageError(
            f"the weights of an average are not negative, and not all 0: {values}. Use task_arithmetic for others"
        )
    if name == "wise_ft" and not 0 <= values[0] <= 1:
        raise UsageError(
            f"the coefficient of wise_ft is the share of the trained values, 0 to 1, and {values[0]} is given"
        )
    return values


def _finite(given: Sequence[float]) -> tuple[float, ...]:
    try:
        values = tuple(float(c) if isinstance(c, int | float) else math.nan for c in given)
    except OverflowError:  # an integer beyond all floats
        values = (math.inf,)
    if not all(map(math.isfinite, values)):
        raise UsageError(f"petune.average_adapters: coefficients are finite numbers, not {given!r}")
    return values


def _of_sum_one(weights: Sequence[float]) -> tuple[float, ...]:
    relative = [weight / max(weights) for weight in weights]  # the sum of large ones would be infinite
    return tuple(weight / sum(relative) for weight in relative)


def _check_density(name: Algorithm, density: float | None) -> None:
    if density is None:
        return
    if name not in DENSITIES:
        raise UsageError(f"density is for ties and dare, and the algorithm is {name}. Leave it out")
    if not 0 < density <= 1:
        raise UsageError(f"density is {density}. It is the share of each task vector that is kept: above 0, at most 1")


@dataclass(frozen=True)
class Combined:
    """The result of combining adapters.

    Attributes:
        values: By the file's keys.
        rank: The rank of a LoRA whose products were combined; None for others.
        errors: For each of its layers what that rank leaves out, relative to the Frobenius norm of the change.
    """

    values: dict[str, Tensor]
    rank: int | None = None
    errors: dict[str, float] = field(default_factory=dict)


def combine_products(
    mixture: Mixture, adapters: Sequence[Mapping[str, Factors]], start: Mapping[str, Factors] | None, rank: int | None
) -> Combined:
    """Combine LoRA adapters as changes of weights, and factor the result.

    Args:
        mixture: How.
        adapters, start: See `Mixture.products`.
        rank: Of the result; None takes the exact one.
    """
    changes = mixture.products(adapters, start)
    check_in_range({layer: c if isinstance(c, Tensor) else c.b_OR for layer, c in changes.items()})
    factors, errors = factored(changes, rank)
    first = next(iter(factors.values()))
    return Combined(lora_tensors(factors), first.a_RI.shape[0], errors)


def check_in_range(values: Mapping[str, Tensor]) -> None:
    """Check that combined values are finite, in float32 too.

    Raises:
        UsageError: They are not: adapters are finite, so a coefficient or a density is out of proportion.
    """
    for key, tensor in values.items():
        parts = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        if not bool(parts.float().isfinite().all()):
            raise UsageError(
                f"the average has values beyond the range of its number format, such as in {key}. Use smaller "
                "coefficients, or a higher density"
            )


def greedy_choice(
    scores: Sequence[float], score_of: Callable[[tuple[int, ...]], float]
) -> tuple[tuple[int, ...], float]:
    """Return which adapters a greedy soup takes, and its score.

    Wortsman et al., ICML 2022, arXiv 2203.05482, recipe 1: from the best adapter to the worst, each is added if the
    average is then at least as good.

    Args:
        scores: Of each adapter alone; higher is better.
        score_of: Returns the score of an average.
    """
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    chosen: tuple[int, ...] = (order[0],)
    best = scores[order[0]]
    for candidate in order[1:]:
        score = score_of((*chosen, candidate))
        if score >= best:
            chosen, best = (*chosen, candidate), score
    return tuple(sorted(chosen)), best
