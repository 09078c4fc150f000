"""Say in sentences what a comparison found: which method is best, by how much, and what cannot be told apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from petune.base.metric import Metric
from petune.base.text import plural
from petune.runner.differences import Difference, num_comparisons

MAX_WITH_NUMBERS = 3
"""Up to this many clear differences are given one by one; of more, the smallest and the largest."""

Differences = Mapping[str, Difference]
"""Differences to one reference, by method."""


def conclusion(best: str, to_best: Differences, to_baseline: Differences, metric: Metric, seeds: str = "") -> str:
    """Return the sentences, without what the intervals are; empty if there is nothing to compare.

    Args:
        best: The best method on test.
        to_best: Differences of the others to it.
        to_baseline: Differences to a named baseline; none if there is no baseline, or it is the best method.
        metric: The main metric.
        seeds: Which seeds are compared, ` on 2 seeds that all have`, where some methods have others.
    """
    if not to_best:
        return ""
    start = f"{best} has the {'highest' if metric.higher_is_better else 'lowest'} {metric.label}{seeds}"
    every = [*to_best.values(), *to_baseline.values()]
    if all(found.is_clear is None for found in every):
        return f"{start}. Too few seeds to tell whether differences to it are more than noise. Use several seeds."
    if to_baseline:
        sentences = [_against_baseline(to_baseline, metric), f"{start}{_open(to_best, 'it', '; ')}"]
    else:
        clear = _clear(to_best)
        ahead = ", " + _ahead(clear, metric) if clear else ""
        sentences = [f"{start}{ahead}{_open(to_best, 'it', '; ' if clear else ', but ')}"]
    return f"{'. '.join(sentences)}."


def _clear(differences: Differences) -> dict[str, Difference]:
    return {method: found for method, found in differences.items() if found.is_clear}


def _ahead(clear: Differences, metric: Metric) -> str:
    """Return `9.00 ± 0.30 points above linear`, of the best method."""
    side = "above" if metric.higher_is_better else "below"
    if len(clear) > MAX_WITH_NUMBERS:
        return f"{_range(clear.values(), metric)} {side} {listed(list(clear))}"
    return listed([f"{_amount(found, metric)} {side} {method}" for method, found in clear.items()])


def _against_baseline(differences: Differences, metric: Metric) -> str:
    """Return `adaptformer is 9.00 ± 0.30 points above linear; lora cannot be told apart from it on 3 seeds`."""
    baseline = next(iter(differences.values())).reference
    clear = _clear(differences)
    clauses = []
    for side, sign in (("above", 1), ("below", -1)):
        methods = {method: found for method, found in clear.items() if sign * found.mean > 0}
        if len(methods) > MAX_WITH_NUMBERS:
            clauses.append(f"{listed(list(methods))} are {_range(methods.values(), metric)} {side} {baseline}")
        else:
            clauses += [f"{m} is {_amount(found, metric)} {side} {baseline}" for m, found in methods.items()]
    return "; ".join(clauses) + _open(differences, baseline, "; " if clauses else "")


def _open(differences: Differences, reference: str, joint: str) -> str:
    """Return the clauses of what is not clear."""
    noise = {method: found for method, found in differences.items() if found.is_clear is False}
    unknown = [method for method, found in differences.items() if found.is_clear is None]
    clauses = []
    if noise:
        seeds = {found.num_seeds for found in noise.values()}
        on_seeds = f" on {plural(seeds.pop(), 'seed')}" if len(seeds) == 1 else ""
        clauses.append(f"{listed(list(noise))} cannot be told apart from {reference}{on_seeds}")
    if unknown:
        clauses.append(f"too few seeds to compare {listed(unknown)} with {reference}")
    return joint + "; ".join(clauses) if clauses else ""


def describe_intervals(to_best: Differences, to_baseline: Differences) -> str:
    """Say what the intervals are; empty if there are none."""
    known = [found for found in (*to_best.values(), *to_baseline.values()) if found.low is not None]
    if not known:
        return ""
    numbers = {found.num_seeds > 1 for found in known}
    images = all(found.over_images for found in known)
    over = "seeds and test images" if True in numbers and images else "seeds" if True in numbers else "test images"
    count = num_comparisons(len(to_best) + 1, is_chosen=not to_baseline)
    of_pairs = "comparisons" if to_baseline else "pairs of methods"
    together = f" that hold together for {count} {of_pairs}" if count > 1 else ""
    one_seed = "; one seed says nothing about other seeds" if False in numbers else ""
    if len(numbers) > 1:
        one_seed = "; those of one seed over test images only"
    return f"Intervals of 95 % over {over}{together}{one_seed}."


def _amount(found: Difference, metric: Metric) -> str:
    assert found.low is not None
    assert found.high is not None
    half = (found.high - found.low) / 2
    return f"{metric.number(abs(found.mean))} ± {metric.number(half)}{_unit(metric)}"


def _range(differences: Iterable[Difference], metric: Metric) -> str:
    sizes = [abs(found.mean) for found in differences]
    return f"{metric.number(min(sizes))} to {metric.number(max(sizes))}{_unit(metric)}"


def _unit(metric: Metric) -> str:
    return " points" if metric.percent else ""


def listed(names: Sequence[str]) -> str:
    """Return `a, b and c`."""
    return " and ".join([*([", ".join(names[:-1])] if names[1:] else []), *names[-1:]])
