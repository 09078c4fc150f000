"""Rows of a table to evaluate a trained model on, without cutting or training anything."""

from __future__ import annotations

import numpy as np

from petune.base.errors import UsageError
from petune.data.reader import LabeledFiles
from petune.data.tables.plan import Plan


def labeled_rows(plan: Plan, part: str) -> LabeledFiles | None:
    """Return the images of `test` or `val`, or of all rows if the table has no splits; None if the targets are masks.

    Raises:
        UsageError: The table has splits, but not this one.
    """
    if plan.columns.kind == "mask":
        return None
    parts = dict(plan.parts)
    if "val" in parts:
        parts.setdefault("test", parts["val"])
    if plan.has_splits and part not in parts:
        raise UsageError(
            f"{plan.table.title} has no {part} split; it has {' and '.join(parts)}", cli_hint="Choose one with --split"
        )
    rows = parts[part] if plan.has_splits else np.arange(len(plan.table))
    chosen = {*rows.tolist()}
    contents = (content for contents in plan.images.contents() for content in contents)
    return LabeledFiles(
        part if plan.has_splits else "all",
        [content for row, content in enumerate(contents) if row in chosen],
        plan.encoded.target,
        plan.encoded.targets[rows],
        plan.encoded.note,
        [plan.row_names[row] for row in rows.tolist()],
    )
