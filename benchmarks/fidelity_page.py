"""The table of docs/fidelity.md, from benchmarks/results/fidelity.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from page_section import with_section

from petune.base.files import replace_file

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "fidelity.json"
PAGE = ROOT / "docs" / "fidelity.md"
BEGIN, END = "<!-- fidelity:begin -->", "<!-- fidelity:end -->"
EXACT = 1e-12
"""Relative differences up to this are rounding in float64."""


def page() -> str:
    """Return the text of the page."""
    return with_section(PAGE, BEGIN, END, f"\n{section()}\n")


def write_page() -> None:
    """Write the page."""
    replace_file(PAGE, page().encode())


def section() -> str:
    """Return the table, those that are equal first."""
    rows = json.loads(RESULT.read_text(encoding="utf-8"))["rows"]
    lines = [
        "| method | authors' code | compared | logits | gradients | |",
        "| --- | --- | --- | ---: | ---: | --- |",
        *map(_line, sorted(rows, key=lambda row: not row["output"] <= EXACT)),
    ]
    return "\n".join(lines)


def _line(row: Mapping[str, Any]) -> str:
    name = row["repository"]
    where = f"/tree/{row['commit']}" if row["commit"] else ""
    code = f"[{name}](https://github.com/{name}{where})"
    code += f" {row['commit'][:7]}" if row["commit"] else ""
    merged = [f"merged: {row['merged']:.0e}"] if row.get("merged") is not None else []
    notes = [*merged, *([row["note"]] if row["note"] else []), row["date"]]
    cells = [f"`{row['method']}`", code, row["of"], _number(row["output"]), _number(row["gradient"]), "; ".join(notes)]
    return "| " + " | ".join(cells) + " |"


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return "0" if value == 0 else f"{value:.0e}" if value <= EXACT else f"{value:.2g}"
