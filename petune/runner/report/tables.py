"""Tables of comparisons and sweeps as text, from the plain data of `compare.json` and `sweep.json`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from petune.base.metric import Metric, shown_metrics
from petune.base.text import capitalized, escape_markdown, format_duration, format_size, plural, printable
from petune.runner.file_names import COMPARE_PLOT
from petune.runner.report.charts import pareto_caption

Row = Mapping[str, Any]
"""A row of `compare.json`."""

UNKNOWN = "–"
"""The text of a value that was not measured."""

IMAGES_PER_S, CLIPS_PER_S = "images/s", "clips/s"
"""Headings of the training speed, of images and of videos."""

Columns = Mapping[str, Callable[[Row], str]]
"""The columns of a table of methods by their heading: functions that return the text of a row."""

COLUMNS: Columns = {
    "tuned": lambda row: f"{row['tuned']:,}",
    "head": lambda row: f"{row['head']:,}",
    "% of backbone": lambda row: f"{row['percent_of_backbone']:.3f}",
    "% of all": lambda row: f"{row['percent_of_total']:.3f}",
    "adapter": lambda row: format_size(row["adapter_bytes"]),
    "lr": lambda row: _number(row["lr"], "g"),
    "epochs": lambda row: _number(row.get("epochs"), "d"),
    "seeds": lambda row: ", ".join(map(str, row["seeds"])),
    IMAGES_PER_S: lambda row: f"{row['images_per_s']:,.0f}",
    "step": lambda row: UNKNOWN if row.get("step_time_s") is None else f"{1000 * row['step_time_s']:,.0f} ms",
    "peak memory": lambda row: format_size(row["peak_memory_bytes"]),
    "time per run": lambda row: format_duration(row["time_s"] / len(row["seeds"])),
}
"""The columns that every task has."""

VAL = "val"
"""Heading of the main metric on val, at the epoch that was chosen there."""

DIFFERENCE = "difference"
"""Heading of the column of differences to the best method, or to the baseline, with 95 % intervals."""

STANDINGS = "Tied: it cannot be told apart from the best one."
"""What `(tied)` means in that column."""

NOT_COMPARED = {"lr", "epochs", "seeds", "step"}
"""Columns that `compare.md` and the terminal leave out."""


def method_columns(metrics: Sequence[Metric], rows: Sequence[Row] = ()) -> Columns:
    """Return every column of a table of methods.

    Args:
        metrics: How to show the metrics, the main one first.
        rows: Rows of runs on videos have a training speed in clips.
    """
    speed = CLIPS_PER_S if any(row.get("num_frames") for row in rows) else IMAGES_PER_S
    main = metrics[0]
    others = {metric.label: partial(_mean_and_std, metric) for metric in shown_metrics(metrics[1:])}
    return {
        "method": lambda row: str(row["method"]),
        main.label: partial(_mean_and_std, main),
        VAL: lambda row: _metric(main, row["val_mean"].get(main.name)),
        **others,
        **{speed if name == IMAGES_PER_S else name: text for name, text in COLUMNS.items()},
    }


def compare_columns(metrics: Sequence[Metric], rows: Sequence[Row] = ()) -> Columns:
    """Return the columns of `compare.md` and of the terminal; see `method_columns`.

    Args:
        metrics: How to show the metrics, the main one first.
        rows: If there are differences among them, they get a column; see `method_columns` for videos.
    """
    omitted = NOT_COMPARED | ({VAL} if rows and not any(row["val_mean"] for row in rows) else set())
    columns = {name: text for name, text in method_columns(metrics, rows).items() if name not in omitted}
    return with_difference(columns, metrics, rows)


def with_difference(columns: Columns, metrics: Sequence[Metric], rows: Sequence[Row]) -> Columns:
    """Return the columns with one of differences after the main metric, if there are any."""
    if not any(row.get("difference") for row in rows):
        return columns
    first = ranked(rows, metrics)[0]
    best = next((row for row in rows if row.get("standing") == "best"), first)["method"]
    texts = list(columns.items())
    return dict([*texts[:2], (DIFFERENCE, partial(_difference, metrics[0], best)), *texts[2:]])


def cells(row: Row, columns: Columns) -> list[str]:
    """Return the text of a row; a method that failed has its reason in the last column."""
    if row["status"] == "failed":
        return [row["method"], *[UNKNOWN] * (len(columns) - 2), f"failed: {row['reason']}"]
    return [text(row) for text in columns.values()]


def ranked(rows: Sequence[Row], metrics: Sequence[Metric]) -> list[Row]:
    """Sort rows by the main metric on test, the best first; methods that failed come last."""
    main = metrics[0]
    return sorted(rows, key=lambda row: main.score(row["mean"].get(main.name)), reverse=True)


def metrics_of(table: Mapping[str, Any]) -> tuple[Metric, ...]:
    """Return how to show the metrics of the plain data of a `compare.json` or `sweep.json`."""
    return tuple(Metric.build(metric) for metric in table["metric_info"])


def comparison_page(comparison: Mapping[str, Any]) -> str:
    """Return `compare.md`: what was compared, the table, and where it was measured."""
    run = comparison["config"]["run"]
    seeds = comparison["config"]["seeds"]
    metrics = metrics_of(comparison)
    rows = ranked(comparison["rows"], metrics)
    columns = compare_columns(metrics, rows)
    lines = [
        f"# {escape_markdown(run['backbone'])} on {escape_markdown(run['dataset'])}",
        "",
        f"Backbone `{_table_cell(comparison['backbone'])}`, weights `{_table_cell(comparison['weights'])}`; "
        f"{plural(run['train']['epochs'], 'epoch')}; {list_seeds(seeds)}. {_what_val_does(run)}, and test is "
        f"read once. {describe_numbers(metrics, rows)}",
        "",
        "| " + " | ".join(columns) + " |",
        "| --- |" + " ---: |" * (len(columns) - 1),
        *("| " + " | ".join(map(_table_cell, cells(row, columns))) + " |" for row in rows),
    ]
    if comparison.get("conclusion"):
        lines += ["", escape_markdown(f"{comparison['conclusion']} {comparison['intervals']}".strip())]
    done = [row for row in rows if row["status"] == "done"]
    if done:
        rates = ", ".join(f"{_table_cell(row['method'])} {row['lr']:g}" for row in done)
        lines += ["", f"Peak learning rates: {rates}."]
    incomplete = {row["method"]: row["seeds"] for row in done if len(row["seeds"]) < len(seeds)}
    if incomplete:
        lines += ["", f"With fewer seeds: {escape_markdown(seeds_by_method(incomplete))}."]
    lines += _conditions(comparison)
    lines += ["", f"![{metrics[0].label} over trained parameters]({COMPARE_PLOT})"]
    front = pareto_caption(done, metrics[0])
    return "\n".join([*lines, *(["", escape_markdown(front)] if front else []), ""])


def _what_val_does(run: Mapping[str, Any]) -> str:
    if run.get("final_fit") == "only":
        return "All epochs train on train and val together: val chooses nothing"
    return "The epoch is chosen on a validation split (val)"


def describe_numbers(metrics: Sequence[Metric], rows: Sequence[Row] = ()) -> str:
    """Return which metrics are percentages, what the numbers are, which method is first, and which are errors.

    Args:
        metrics: How to show the metrics.
        rows: Of the table, which tell whether a method is marked as tied.
    """
    shown = shown_metrics(metrics)
    percent = [metric.label for metric in shown if metric.percent]
    names = capitalized(" and ".join([", ".join(percent[:-1]), percent[-1]] if percent[:-1] else percent))
    unit = f"{names} are percentages:" if percent[1:] else f"{names} is a percentage:" if percent else "Metrics are"
    lower = ", ".join(metric.label for metric in shown if not metric.higher_is_better)
    errors = f" Lower is better: {lower}." if lower else ""
    tied = f" {STANDINGS}" if any(row.get("standing") == "tied" for row in rows) else ""
    return f"{unit} mean ± sample standard deviation over the seeds. The best method is first.{errors}{tied}"


def _conditions(comparison: Mapping[str, Any]) -> list[str]:
    origins = comparison.get("origins") or []
    if origins:
        groups = [(escape_markdown(seeds_by_method(o["runs"])), _describe_origin(o["provenance"])) for o in origins]
        return ["", "Measured under different conditions:", "", *(f"- {runs}: {where}" for runs, where in groups)]
    if comparison["provenance"]:
        return ["", f"Measured on {_describe_origin(comparison['provenance'])}"]
    return []


def list_seeds(seeds: Sequence[int]) -> str:
    """Return `seed 0`, or `seeds 0, 1`."""
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def seeds_by_method(runs: Mapping[str, Sequence[int]]) -> str:
    """Return `linear (seeds 0, 1), vpt (seed 0)`."""
    parts = []
    for method, seeds in runs.items():
        parts.append(f"{method} ({list_seeds(seeds)})")
    return ", ".join(parts)


def trial_table(sweep: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows of a `sweep.json`: the trials, best first. Only the best one has metrics on test."""
    main = next(iter(metrics_of(sweep)), None)

    def value(metrics: Mapping[str, float] | None) -> float | None:
        return metrics.get(main.name) if main and metrics else None

    def score(row: Row) -> float:
        return main.score(value(row["val_metrics"])) if main else 0.0

    trials = sorted(sweep["rows"], key=score, reverse=True)
    names = list(dict.fromkeys(name for row in sweep["rows"] for name in row["params"]))
    test = {sweep["best"]: value((sweep["result"] or {}).get("metrics"))}
    rows = [
        [
            str(row["trial"]),
            *(_parameter(row["params"].get(name)) for name in names),
            UNKNOWN if row["tuned"] is None else f"{row['tuned']:,}",
            _metric(main, value(row["val_metrics"])),
            _metric(main, test.get(row["trial"])),
            _parameter(row["epoch"]),
            UNKNOWN if row["time_s"] is None else format_duration(row["time_s"]),
            f"failed: {row['reason']}" if row["state"] == "failed" else row["state"],
        ]
        for row in trials
    ]
    label = f"{main.label} on " if main else ""
    return ["trial", *names, "tuned", f"{label}val", f"{label}test", "epoch", "time", "state"], rows


def _describe_origin(provenance: Mapping[str, Any]) -> str:
    git = provenance.get("git") or {}
    changes = " with uncommitted changes" if git.get("dirty") else ""
    commit = f"; commit {git['commit'][:7]}{changes}" if git.get("commit") else ""
    versions = ", ".join(f"{name} {version}" for name, version in provenance["versions"].items() if version)
    threads = f"{provenance['threads']} thread{'s' * (provenance['threads'] != 1)}"
    device = escape_markdown(provenance["device"])
    return f"{device}, {threads}, {provenance['precision']}; {versions}{commit}."


def _mean_and_std(metric: Metric, row: Row) -> str:
    mean, std = row["mean"].get(metric.name), row["std"].get(metric.name)
    if mean is None:
        return UNKNOWN
    return metric.number(mean) if std is None else f"{metric.number(mean)} ± {metric.number(std)}"


def _difference(metric: Metric, best: str, row: Row) -> str:
    """Return `-1.20 [-2.30, -0.10]`, and mark the best method and those that cannot be told apart from it."""
    found = row.get("difference")
    mark = "best" if row["method"] == best else "tied" if row.get("standing") == "tied" else ""
    if not found:
        return "best" if mark == "best" else f"baseline{_in_brackets(mark)}"
    mean, low, high = (None if found[key] is None else _signed(metric, found[key]) for key in ("mean", "low", "high"))
    interval = "" if low is None else f" [{low}, {high}]"
    return f"{mean}{interval}{_in_brackets(mark)}"


def _in_brackets(mark: str) -> str:
    return f" ({mark})" if mark else ""


def _signed(metric: Metric, value: float) -> str:
    return f"{'+' if value > 0 else ''}{metric.number(value)}"


def _metric(metric: Metric | None, value: float | None) -> str:
    return UNKNOWN if metric is None or value is None else metric.number(value)


def _number(value: float | None, form: str) -> str:
    return UNKNOWN if value is None else f"{value:{form}}"


def _parameter(value: Any) -> str:
    return _number(value, ".4g") if isinstance(value, float) else UNKNOWN if value is None else str(value)


def _table_cell(text: str) -> str:
    return printable(text).replace("\n", " ").replace("|", "\\|").replace("<", "&lt;")
