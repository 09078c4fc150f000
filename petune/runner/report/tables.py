"""Tables and images of a comparison, from the plain data of `compare.json`."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from petune.base.text import (
    escape_markdown,
    format_duration as format_duration,
    format_size as format_size,
    printable as printable,
)

COLUMNS = (
    "method", "tuned", "head", "% of backbone", "% of all", "adapter", "top-1", "top-5", "images/s", "peak memory",
    "time a run",
)  # fmt: skip


def cells(row: Mapping[str, Any]) -> list[str]:
    """The text of one row, in the order of `COLUMNS`; a failed method shows its reason."""
    if row["status"] == "failed":
        return [row["method"], *["–"] * (len(COLUMNS) - 2), f"failed: {row['reason']}"]
    return [
        row["method"],
        f"{row['tuned']:,}",
        f"{row['head']:,}",
        f"{row['percent_of_backbone']:.3f}",
        f"{row['percent_of_total']:.3f}",
        format_size(row["adapter_bytes"]),
        _spread(row["top1_mean"], row["top1_std"]),
        _spread(row["top5_mean"], row["top5_std"]),
        f"{row['images_per_s']:,.0f}",
        format_size(row["peak_memory_bytes"]),
        format_duration(row["time_s"] / len(row["seeds"])),
    ]


def trial_table(sweep: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of a `sweep.json`: the trials, best first, and what only the best one has, its test."""
    trials = sweep["rows"]
    names = list(dict.fromkeys(name for row in trials for name in row["params"]))
    tested = {sweep["best"]: (sweep["result"] or {}).get("top1")}
    rows = [
        [
            str(row["trial"]),
            *(_value(row["params"].get(name)) for name in names),
            "–" if row["tuned"] is None else f"{row['tuned']:,}",
            _accuracy(row["val_top1"]),
            _accuracy(tested.get(row["trial"])),
            _value(row["epoch"]),
            "–" if row["time_s"] is None else format_duration(row["time_s"]),
            f"failed: {row['reason']}" if row["state"] == "failed" else row["state"],
        ]
        for row in sorted(trials, key=lambda row: -(row["val_top1"] or -1))
    ]
    return ["trial", *names, "tuned", "top-1 on val", "top-1 on test", "epoch", "time", "state"], rows


def markdown(comparison: Mapping[str, Any]) -> str:
    """The whole comparison as Markdown: what was compared, the table, where it was measured."""
    config, shared = comparison["config"], comparison["config"]["run"]
    seeds = ", ".join(map(str, config["seeds"]))
    lines = [
        f"# {escape_markdown(shared['backbone'])} on {escape_markdown(shared['dataset'])}",
        "",
        f"Backbone `{_cell(comparison['backbone'])}`, weights `{_cell(comparison['weights'])}`; "
        f"{shared['train']['epochs']} epochs; seeds {seeds}. The epoch is chosen on a validation split, "
        "test is read once. Top-1 and top-5 in percent, mean ± sample standard deviation over the seeds.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "| --- |" + " ---: |" * (len(COLUMNS) - 1),
    ]
    lines += ["| " + " | ".join(_cell(c) for c in cells(row)) + " |" for row in comparison["rows"]]
    rates = ", ".join(f"{_cell(row['method'])} {row['lr']:g}" for row in comparison["rows"] if row["status"] == "done")
    lines += ["", f"Peak learning rates: {rates}."] if rates else []
    fewer = {
        r["method"]: r["seeds"]
        for r in comparison["rows"]
        if r["status"] == "done" and len(r["seeds"]) < len(config["seeds"])
    }
    lines += ["", f"With fewer seeds: {escape_markdown(seeds_by_method(fewer))}."] if fewer else []
    origins = comparison.get("origins") or []
    if origins:
        lines += ["", "Measured in several places:", ""]
        lines += [f"- {escape_markdown(seeds_by_method(o['runs']))}: {_measured(o['provenance'])}" for o in origins]
    elif comparison["provenance"]:
        lines += ["", f"Measured on {_measured(comparison['provenance'])}"]
    return "\n".join([*lines, "", "![top-1 over trained parameters](compare.svg)", ""])


def seeds_by_method(runs: Mapping[str, Sequence[int]]) -> str:
    """`linear (seeds 0, 1), vpt (seed 0)`."""
    counted = {method: f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}" for method, seeds in runs.items()}
    return ", ".join(f"{method} ({seeds})" for method, seeds in counted.items())


def _measured(where: Mapping[str, Any]) -> str:
    commit = (where.get("git") or {}).get("commit", "")
    versions = ", ".join(f"{k} {v}" for k, v in where["versions"].items() if v)
    threads = f"{where['threads']} thread{'s' * (where['threads'] != 1)}"
    dirty = " with changes that are not committed" if (where.get("git") or {}).get("dirty") else ""
    at = f"; commit {commit[:7]}{dirty}" if commit else ""
    return f"{escape_markdown(where['device'])}, {threads}, {where['precision']}; {versions}{at}."


def image(comparison: Mapping[str, Any]) -> bytes:
    """Top-1 on test over trained parameters (log axis) as SVG; a bar spans one standard deviation."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = [row for row in comparison["rows"] if row["status"] == "done"]
    # A fixed salt and no date: the same comparison gives the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "petune", "svg.fonttype": "none", "text.parse_math": False}):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.add_subplot()
        for row in rows:
            trained = row["tuned"] + row["head"]
            axes.errorbar(trained, row["top1_mean"], yerr=row["top1_std"], fmt="o", capsize=3)
            axes.annotate(row["method"], (trained, row["top1_mean"]), xytext=(6, 5), textcoords="offset points")
        axes.set_xscale("log")
        axes.margins(0.18, 0.15)
        axes.set_xlabel("trained parameters (tuned and head)")
        axes.set_ylabel("top-1 on test, percent")
        shared = comparison["config"]["run"]
        axes.set_title(f"{shared['backbone']} on {shared['dataset']}")
        axes.grid(alpha=0.3)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _spread(mean: float, std: float | None) -> str:
    return f"{mean:.2f}" if std is None else f"{mean:.2f} ± {std:.2f}"


def _accuracy(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _value(value: Any) -> str:
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _cell(text: str) -> str:
    return printable(text).replace("\n", " ").replace("|", "\\|").replace("<", "&lt;")
