"""Show what benchmarks/averaging.py measured, for docs/results.md."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from card import commit_of

RESULT = Path(__file__).resolve().parent / "results" / "averaging.json"
TITLE = "## Averages of adapters"
ABOUT = (
    "Three seeds of vit_nano, each with its own few images per class, and averages of them by `petune average`; top-1 "
    "on test. Best on val is the seed that val would have chosen. `greedy` chooses on the same images, which no seed "
    "trains on; `wise_ft` is half way from the start to the mean of the seeds. `adaptformer-continued` is AdaptFormer "
    "again, with three seeds that continue one adapter of an epoch (`petune run --from`)."
)
AVERAGES = ("uniform", "greedy", "wise_ft")
SETTINGS = {
    "cifar": "50 images per class of CIFAR-10 (`python benchmarks/averaging.py cifar`)",
    "digits": "10 images per class of digits (`python benchmarks/averaging.py digits`)",
}


def section(file: Path = RESULT) -> list[str]:
    """Return the lines of docs/results.md."""
    measured = json.loads(file.read_text()) if file.exists() else {}
    lines = [TITLE, "", ABOUT, ""]
    for name, title in SETTINGS.items():
        lines += [f"### {title}", "", *(_setting(measured[name]) if name in measured else ["Not run yet."]), ""]
    return lines


def _setting(measured: Mapping[str, Any]) -> list[str]:
    columns = ("method", "seeds", "mean", "best on val", *AVERAGES)
    rows = [
        [
            f"`{method}`",
            ", ".join(f"{value:.2f}" for value in row["seeds"]),
            f"{row['mean']:.2f}",
            f"{row['best_on_val']:.2f}",
            *(_average(row[label]) for label in AVERAGES),
        ]
        for method, row in measured["rows"].items()
    ]
    table = [list(columns), ["---", *["---:"] * (len(columns) - 1)], *rows]
    train = measured["options"]["train"]
    about = (
        f"{train['epochs']} epochs, {measured['num_test']:,} images of test: one image is "
        f"{100 / measured['num_test']:.2f} points. Measured at {_commits(measured)}."
    )
    refused = [
        f"- `{label}` of `{method}` is refused: {row[label]['refused']}"
        for method, row in measured["rows"].items()
        for label in AVERAGES
        if "refused" in row[label]
    ]
    return [*("| " + " | ".join(row) + " |" for row in table), "", about, *(["", *refused] if refused else [])]


def _commits(measured: Mapping[str, Any]) -> str:
    """Return the commits of all rows; an earlier version stored one for all of them."""
    shared = [measured["provenance"]] if "provenance" in measured else []
    every = [one for row in measured["rows"].values() for one in row.get("provenance", shared)]
    return ", ".join(dict.fromkeys(commit_of({"provenance": one}) for one in every))


def _average(result: Mapping[str, Any]) -> str:
    if "refused" in result:
        return "refused"
    used = sum(coefficient != 0 for coefficient in result["coefficients"])
    return f"{result['top1']:.2f}" + (f" (of {used})" if result["val"] is not None else "")
