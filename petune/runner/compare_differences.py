"""Add to the rows of a comparison how each method differs from the best one, or from a named baseline."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from petune.base.metric import Metric
from petune.base.text import plural
from petune.runner.compare_config import CompareConfig
from petune.runner.comparison import Row, Standing
from petune.runner.conclusion import conclusion, describe_intervals
from petune.runner.differences import Difference, SeedValue, Values, differences_to
from petune.runner.test_values import read_test_values


@dataclass(frozen=True)
class Findings:
    """The result of a comparison.

    Attributes:
        rows: With their differences and standing.
        conclusion: Sentences on the best method, clear differences and those that are not.
        intervals: A sentence on what the intervals are.
    """

    rows: tuple[Row, ...]
    conclusion: str = ""
    intervals: str = ""


def with_differences(config: CompareConfig, rows: Sequence[Row], metric: Metric) -> Findings:
    """Compare the methods with the best one, or with a named baseline.

    Args:
        config: Names the baseline, if there is one, and the directories of the runs.
        rows: Of all methods; those that failed stay as they are. Only seeds that all others have are compared.
        metric: The main metric.
    """
    done = [row for row in rows if row.status == "done" and metric.name in row.mean]
    if len(done) < 2:
        return Findings(tuple(rows))
    values = _of_shared_seeds({row.method: _values(config, row, metric) for row in done})
    if values is None:
        return Findings(tuple(rows), "No seed was run with all methods, so nothing says which is best.")
    best = max(values, key=lambda method: metric.score(_mean(values[method])))
    to_best = differences_to(best, values, is_chosen=True)
    to_baseline = {}
    if config.baseline in values and config.baseline != best:
        to_baseline = differences_to(config.baseline, values)
    shown = to_baseline or to_best
    changed = []
    for row in rows:
        standing = _standing(row.method, best, to_best)
        changed.append(row.model_copy(update={"difference": shown.get(row.method), "standing": standing}))
    intervals = describe_intervals(to_best, to_baseline)
    seeds = "" if len({row.seeds for row in done}) == 1 else f" on {plural(len(values[best]), 'seed')} that all have"
    return Findings(tuple(changed), conclusion(best, to_best, to_baseline, metric, seeds), intervals)


def _of_shared_seeds(values: Mapping[str, Values]) -> dict[str, Values] | None:
    """Return the values of the seeds that all methods have, or None: means over other seeds are not comparable."""
    shared = set.intersection(*(set(of_seed) for of_seed in values.values()))
    if not shared:
        return None
    return {method: {seed: of_seed[seed] for seed in sorted(shared)} for method, of_seed in values.items()}


def _mean(values: Values) -> float:
    return statistics.fmean(value.value for value in values.values())


def _standing(method: str, best: str, to_best: Mapping[str, Difference]) -> Standing | None:
    if method == best:
        return "best"
    is_clear = to_best[method].is_clear if method in to_best else None
    return None if is_clear is None else "below" if is_clear else "tied"


def _values(config: CompareConfig, row: Row, metric: Metric) -> dict[int, SeedValue]:
    """Return the main metric of each seed of a method, with the values of its images if the run stored them."""
    directories = {run.seed: run.output for run in config.runs() if run.method == row.method}
    values = {}
    for seed, value in zip(row.seeds, row.metrics[metric.name], strict=True):
        directory = directories.get(seed)
        stored = {} if directory is None else read_test_values(directory)
        values[seed] = SeedValue(value, stored.get(metric.name))
    return values
