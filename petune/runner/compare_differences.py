"""Add to the rows of a comparison how each method differs from the best one, or from a named baseline."""

from __future__ import annotations

from collections.abc import Sequence

from petune.base.metric import Metric
from petune.runner.compare_config import CompareConfig
from petune.runner.comparison import Row
from petune.runner.differences import SeedValue, conclusion, difference
from petune.runner.test_values import read_test_values


def with_differences(config: CompareConfig, rows: Sequence[Row], metric: Metric) -> tuple[tuple[Row, ...], str]:
    """Return the rows with their differences to the reference, and a sentence that says which of them are noise.

    Args:
        config: Names the baseline, if there is one, and the directories of the runs.
        rows: Of all methods; those that failed stay as they are.
        metric: The main metric.
    """
    done = [row for row in rows if row.status == "done" and metric.name in row.mean]
    if len(done) < 2:
        return tuple(rows), ""
    best = max(done, key=lambda row: metric.score(row.mean[metric.name])).method
    reference = config.baseline if config.baseline in {row.method for row in done} else best
    values = {row.method: _values(config, row, metric) for row in done}
    differences = {}
    for method, own in values.items():
        found = difference(reference, own, values[reference])
        if method != reference and found is not None:
            differences[method] = found
    changed = tuple(row.model_copy(update={"difference": differences.get(row.method)}) for row in rows)
    return changed, conclusion(differences, metric, reference_is_best=reference == best)


def _values(config: CompareConfig, row: Row, metric: Metric) -> dict[int, SeedValue]:
    """Return the main metric of each seed of a method, with the values of its images if the run stored them."""
    directories = {run.seed: run.output for run in config.runs() if run.method == row.method}
    values = {}
    for seed, value in zip(row.seeds, row.metrics[metric.name], strict=True):
        directory = directories.get(seed)
        stored = {} if directory is None else read_test_values(directory)
        values[seed] = SeedValue(value, stored.get(metric.name))
    return values
