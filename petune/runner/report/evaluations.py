"""Show the evaluations of a run in a report: confusion matrix and mistakes, from the files that `petune eval` wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petune.base.config import Config
from petune.base.errors import ConfigError
from petune.runner.file_names import FIRST_BATCH_FILE
from petune.runner.report.charts import Chart
from petune.runner.report.confusion import confusion_figure
from petune.runner.report.plots import to_markup
from petune.runner.report.tiles import Gallery

EVALUATION_FILE = "eval.json"
MISTAKES_FILE = "mistakes.json"


class Galleries(Config):
    """The galleries of a file."""

    galleries: tuple[Gallery, ...] = ()


@dataclass(frozen=True)
class Shown:
    """Images of a run, to be folded out.

    Attributes:
        title: What they are.
        charts, galleries: Figures and images.
    """

    title: str
    charts: Sequence[Chart]
    galleries: Sequence[Gallery]


def galleries_file(galleries: Sequence[Gallery]) -> bytes:
    """Return the content of a file of galleries."""
    return (Galleries(galleries=tuple(galleries)).model_dump_json() + "\n").encode()


def shown_of(run_dir: Path, label: str) -> list[Shown]:
    """Return the first batch of a run and its evaluations; what is damaged or missing is left out.

    Args:
        run_dir: The run.
        label: Its name in the report.
    """
    first = _galleries(run_dir / FIRST_BATCH_FILE)
    shown = [Shown(f"{label}: first training images", (), first)] if first else []
    for file in sorted(run_dir.glob(f"eval-*/{EVALUATION_FILE}")):
        galleries = _galleries(file.parent / MISTAKES_FILE)
        title = f"{label}: evaluation on {file.parent.name.removeprefix('eval-')}"
        charts = _charts(_read(file), f"{run_dir} {file.parent.name}")
        if charts or galleries:
            shown.append(Shown(title, charts, galleries))
    return shown


def _charts(evaluation: dict[str, Any], salt: str) -> list[Chart]:
    try:
        names = [str(row["name"]) for row in evaluation.get("classes", ())]
        counts = [[int(number) for number in row] for row in evaluation.get("confusion", ())]
    except (KeyError, TypeError, ValueError, AttributeError):
        return []
    if not names or [len(row) for row in counts] != [len(names)] * len(names):
        return []
    return [Chart(to_markup(confusion_figure(counts, names), f"confusion {salt}"), "Confusion matrix")]


def _galleries(file: Path) -> tuple[Gallery, ...]:
    try:
        return Galleries.build(_read(file), str(file)).galleries
    except ConfigError:
        return ()


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
