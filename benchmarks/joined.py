"""Merge two tables of one comparison, measured on two machines: no run is lost, none is counted twice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from petune.runner.comparison import ORIGIN_KEYS, Comparison, Origin, Row

SAME = ("tuned", "head", "total", "adapter_bytes", "lr")
NOT_COMPARED = {"difference": None, "standing": None}
"""Of the rows of joined tables: each table was compared with its own best method."""
PATHS_AND_RUN = {"output", "data_dir", "resume", "method", "seed"}


def joined(old: Comparison, new: Comparison, order: Sequence[str], one_backbone: bool | None = None) -> Comparison:
    """Return one table. A method that both have with different seeds gets one row with all of its seeds.

    Args:
        old, new: The tables; `new` replaces rows that it has with all their seeds.
        order: Of the methods.
        one_backbone: Whether their weights come from the same pretraining; None if there was no pretraining.

    Raises:
        ValueError: Recipe or weights differ, or a method has another learning rate or size, or some of its seeds are
            in both tables.
    """
    again = {row.method: set(row.seeds) for row in new.rows}
    if all(row.method in again and set(row.seeds) <= again[row.method] for row in old.rows):
        return new
    if not any(again.values()):  # all failed: even the backbone's name is unknown
        return old
    _need_one_recipe(old, new, one_backbone)
    rows, used = _rows(old, new)
    origins = [_without(origin, {m for m in used if rows[m] in new.rows}) for origin in _origins(old)]
    origins += [_only(origin, used) for origin in _origins(new)]
    methods = tuple(sorted(rows, key=lambda method: order.index(method) if method in order else len(order)))
    given = {*old.config.lrs, *new.config.lrs}
    lrs = {method: lr for method in methods if method in given and (lr := rows[method].lr) is not None}
    seeds = tuple(sorted({seed for row in rows.values() for seed in row.seeds}))
    all_origins = _merged([origin for origin in origins if origin.runs])
    latest = new if any(rows[method].seeds for method in used) else old
    return latest.model_copy(
        update={
            "config": latest.config.model_copy(update={"methods": methods, "seeds": seeds, "lrs": lrs}),
            "rows": tuple(rows[method].model_copy(update=NOT_COMPARED) for method in methods),
            "conclusion": "",
            "intervals": "",
            "origins": tuple(all_origins) if len(all_origins) > 1 else (),
        }
    )


def _rows(old: Comparison, new: Comparison) -> tuple[dict[str, Row], set[str]]:
    """Return the rows by method, and the methods that have runs of `new`."""
    rows, used = {row.method: row for row in old.rows}, set[str]()
    for row in new.rows:
        before = rows.get(row.method)
        if before is None or set(before.seeds) <= set(row.seeds):  # measured again with all seeds
            rows[row.method] = row
        elif not row.seeds:  # a failure
            continue
        elif set(row.seeds) <= set(before.seeds):
            _need_one_size(before, row)
            continue
        else:
            rows[row.method] = _one_row(before, row)
        used.add(row.method)
    return rows, used


def _need_one_recipe(old: Comparison, new: Comparison, one_backbone: bool | None) -> None:
    paths = PATHS_AND_RUN if one_backbone is None else {*PATHS_AND_RUN, "weights"}
    # The precision depends on the machine: the table names it for each run, and suites/precision.yaml shows that it
    # does not change the accuracy.
    apart = dict.fromkeys(paths, True) | {"train": {"precision"}}
    shared = [one.config.run.model_dump(mode="json", exclude=apart) for one in (old, new)]
    weights = old.weights == new.weights if one_backbone is None else one_backbone
    if shared[0] != shared[1] or old.backbone != new.backbone or not weights:
        raise ValueError(
            "the committed results have another recipe or backbone, so they cannot be merged. "
            "Measure all of their methods and seeds again to replace them"
        )


def _need_one_size(a: Row, b: Row) -> None:
    if other := [name for name in SAME if getattr(a, name) != getattr(b, name)]:
        raise ValueError(f"{a.method}: the committed row has another {', '.join(other)}. See --kept-rates")


def _one_row(a: Row, b: Row) -> Row:
    """Return one row with the seeds of two, and mean and standard deviation over all of them."""
    if set(a.seeds) & set(b.seeds):
        raise ValueError(
            f"{a.method}: seeds {a.seeds} are committed and {b.seeds} were measured; some are in both. "
            "Measure all of them, or with --seeds only the missing ones"
        )
    _need_one_size(a, b)
    n, m = len(a.seeds), len(b.seeds)
    seeds = tuple(sorted((*a.seeds, *b.seeds)))

    def values(name: str) -> tuple[float, ...]:
        by_seed = dict(zip((*a.seeds, *b.seeds), (*a.metrics[name], *b.metrics[name]), strict=True))
        return tuple(by_seed[seed] for seed in seeds)

    def mean(x: float | None, y: float | None) -> float | None:
        return None if x is None or y is None else (n * x + m * y) / (n + m)

    def means(x: Mapping[str, float], y: Mapping[str, float]) -> dict[str, float]:
        return {name: (n * x[name] + m * y[name]) / (n + m) for name in x if name in y}

    def spread(name: str) -> float:
        """Combine the sums of squares around each mean, and the distance of the means."""
        x, y = a.mean[name], b.mean[name]
        squares = sum((k - 1) * row.std.get(name, 0.0) ** 2 for k, row in ((n, a), (m, b)))
        return math.sqrt((squares + n * m / (n + m) * (x - y) ** 2) / (n + m - 1))

    both = means(a.mean, b.mean)
    measured = {
        "seeds": seeds,
        "metrics": {name: values(name) for name in a.metrics if name in b.metrics},
        "mean": both,
        "std": {name: spread(name) for name in both},
        "val_mean": means(a.val_mean, b.val_mean),
        "epochs": max((row.epochs for row in (a, b) if row.epochs is not None), default=None),
        "images_per_s": mean(a.images_per_s, b.images_per_s),
        "step_time_s": mean(a.step_time_s, b.step_time_s),
        "peak_memory_bytes": max(a.peak_memory_bytes or 0, b.peak_memory_bytes or 0),
        "time_s": (a.time_s or 0.0) + (b.time_s or 0.0),
    }
    return b.model_copy(update=measured)


def _origins(comparison: Comparison) -> tuple[Origin, ...]:
    """Return the origins, also if there is only one."""
    if comparison.origins:
        return comparison.origins
    runs = {row.method: row.seeds for row in comparison.rows if row.seeds}
    return (Origin(runs=runs, provenance={key: comparison.provenance.get(key) for key in ORIGIN_KEYS}),)


def _without(origin: Origin, methods: set[str]) -> Origin:
    return _only(origin, set(origin.runs) - methods)


def _only(origin: Origin, methods: set[str]) -> Origin:
    return origin.model_copy(update={"runs": {m: seeds for m, seeds in origin.runs.items() if m in methods}})


def _merged(origins: Sequence[Origin]) -> list[Origin]:
    """Merge origins with the same conditions."""
    merged: list[Origin] = []
    for origin in origins:
        same = next((other for other in merged if other.provenance == origin.provenance), None)
        if same is None:
            merged.append(origin)
        else:
            runs = {m: (*same.runs.get(m, ()), *origin.runs.get(m, ())) for m in {**same.runs, **origin.runs}}
            merged[merged.index(same)] = same.model_copy(update={"runs": runs})
    return merged
