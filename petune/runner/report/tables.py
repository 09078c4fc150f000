"""Tables of comparisons and sweeps as text, from the plain data of `compare.json` and `sweep.json`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from petune.base.text import escape_markdown, format_duration, format_size, has_top5, plural, printable
from petune.runner.file_names import COMPARE_PLOT

Row = Mapping[str, Any]
"""A row of `compare.json`."""

UNKNOWN = "–"
"""The text of a value that was not measured."""

COLUMNS: dict[str, Callable[[Row], str]] = {
    "method": lambda row: str(row["method"]),
    "top-1": lambda row: _mean_and_std(row["top1_mean"], row["top1_std"]),
    "top-5": lambda row: _mean_and_std(row["top5_mean"], row["top5_std"]) if _has_top5(row) else UNKNOWN,
    "val": lambda row: _number(row["val_top1_mean"], ".2f"),
    "tuned": lambda row: f"{row['tuned']:,}",
    "head": lambda row: f"{row['head']:,}",
    "% of backbone": lambda row: f"{row['percent_of_backbone']:.3f}",
    "% of all": lambda row: f"{row['percent_of_total']:.3f}",
    "adapter": lambda row: format_size(row["adapter_bytes"]),
    "lr": lambda row: _number(row["lr"], "g"),
    "epochs": lambda row: _number(row.get("epochs"), "d"),
    "seeds": lambda row: ", ".join(map(str, row["seeds"])),
    "images/s": lambda row: f"{row['images_per_s']:,.0f}",
    "step": lambda row: UNKNOWN if row.get("step_time_s") is None else f"{1000 * row['step_time_s']:,.0f} ms",
    "peak memory": lambda row: format_size(row["peak_memory_bytes"]),
    "time per run": lambda row: format_duration(row["time_s"] / len(row["seeds"])),
}
"""Every column of a table of methods, by its heading; other tables show a selection of them."""

COMPARE_COLUMNS = tuple(name for name in COLUMNS if name not in {"val", "lr", "epochs", "seeds", "step"})
"""The columns of `compare.md` and of the terminal; see `compare_columns`."""


def compare_columns(rows: Sequence[Row]) -> tuple[str, ...]:
    """Return the columns of a comparison; without top-5 if the dataset has five classes or fewer."""
    has_top5 = all(map(_has_top5, rows))
    return tuple(name for name in COMPARE_COLUMNS if has_top5 or name != "top-5")


def cells(row: Row, columns: Sequence[str]) -> list[str]:
    """Return the text of a row; a method that failed has its reason in the last column."""
    if row["status"] == "failed":
        return [row["method"], *[UNKNOWN] * (len(columns) - 2), f"failed: {row['reason']}"]
    return [COLUMNS[name](row) for name in columns]


def ranked(rows: Sequence[Row]) -> list[Row]:
    """Sort rows by top-1 on test, the best first; methods that failed come last."""
    return sorted(rows, key=lambda row: -1.0 if row["top1_mean"] is None else row["top1_mean"], reverse=True)


def comparison_page(comparison: Mapping[str, Any]) -> str:
    """Return `compare.md`: what was compared, the table, and where it was measured."""
    run = comparison["config"]["run"]
    seeds = comparison["config"]["seeds"]
    rows = ranked(comparison["rows"])
    columns = compare_columns(rows)
    percentages = "Top-1 and top-5 are percentages" if "top-5" in columns else "Top-1 is a percentage"
    lines = [
        f"# {escape_markdown(run['backbone'])} on {escape_markdown(run['dataset'])}",
        "",
        f"Backbone `{_table_cell(comparison['backbone'])}`, weights `{_table_cell(comparison['weights'])}`; "
        f"{plural(run['train']['epochs'], 'epoch')}; {list_seeds(seeds)}. The epoch is chosen on a validation "
        f"split, and test is read once. {percentages}: mean ± sample standard deviation over the "
        "seeds. The best method is first.",
        "",
        "| " + " | ".join(columns) + " |",
        "| --- |" + " ---: |" * (len(columns) - 1),
        *("| " + " | ".join(map(_table_cell, cells(row, columns))) + " |" for row in rows),
    ]
    done = [row for row in rows if row["status"] == "done"]
    if done:
        rates = ", ".join(f"{_table_cell(row['method'])} {row['lr']:g}" for row in done)
        lines += ["", f"Peak learning rates: {rates}."]
    incomplete = {row["method"]: row["seeds"] for row in done if len(row["seeds"]) < len(seeds)}
    if incomplete:
        lines += ["", f"With fewer seeds: {escape_markdown(seeds_by_method(incomplete))}."]
    lines += _conditions(comparison)
    return "\n".join([*lines, "", f"![top-1 over trained parameters]({COMPARE_PLOT})", ""])


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
    """Return columns and rows of a `sweep.json`: the trials, best first. Only the best one has a test accuracy."""
    trials = sorted(sweep["rows"], key=lambda row: -(row["val_top1"] or -1))
    names = list(dict.fromkeys(name for row in sweep["rows"] for name in row["params"]))
    test = {sweep["best"]: (sweep["result"] or {}).get("top1")}
    rows = [
        [
            str(row["trial"]),
            *(_parameter(row["params"].get(name)) for name in names),
            UNKNOWN if row["tuned"] is None else f"{row['tuned']:,}",
            _number(row["val_top1"], ".2f"),
            _number(test.get(row["trial"]), ".2f"),
            _parameter(row["epoch"]),
            UNKNOWN if row["time_s"] is None else format_duration(row["time_s"]),
            f"failed: {row['reason']}" if row["state"] == "failed" else row["state"],
        ]
        for row in trials
    ]
    return ["trial", *names, "tuned", "top-1 on val", "top-1 on test", "epoch", "time", "state"], rows


def _describe_origin(provenance: Mapping[str, Any]) -> str:
    git = provenance.get("git") or {}
    changes = " with uncommitted changes" if git.get("dirty") else ""
    commit = f"; commit {git['commit'][:7]}{changes}" if git.get("commit") else ""
    versions = ", ".join(f"{name} {version}" for name, version in provenance["versions"].items() if version)
    threads = f"{provenance['threads']} thread{'s' * (provenance['threads'] != 1)}"
    device = escape_markdown(provenance["device"])
    return f"{device}, {threads}, {provenance['precision']}; {versions}{commit}."


def _has_top5(row: Row) -> bool:
    return has_top5(row.get("num_classes"))


def _mean_and_std(mean: float, std: float | None) -> str:
    return f"{mean:.2f}" if std is None else f"{mean:.2f} ± {std:.2f}"


def _number(value: float | None, form: str) -> str:
    return UNKNOWN if value is None else f"{value:{form}}"


def _parameter(value: Any) -> str:
    return _number(value, ".4g") if isinstance(value, float) else UNKNOWN if value is None else str(value)


def _table_cell(text: str) -> str:
    return printable(text).replace("\n", " ").replace("|", "\\|").replace("<", "&lt;")
