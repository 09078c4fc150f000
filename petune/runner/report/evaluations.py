"""Show the evaluations of a run in a report: confusion matrix, classes, mistakes; from the files of `petune eval`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petune.base.errors import ConfigError
from petune.base.metric import Metric
from petune.runner.file_names import FIRST_BATCH_FILE
from petune.runner.report.charts import Chart
from petune.runner.report.confusion import confusion_figure
from petune.runner.report.plots import to_markup
from petune.runner.report.tiles import Galleries, Gallery

EVALUATION_FILE = "eval.json"
MISTAKES_FILE = "mistakes.json"
MAX_CLASSES = 50
"""Rows of the table of classes."""


@dataclass(frozen=True)
class ClassTable:
    """The classes of an evaluation, the worst first.

    Attributes:
        about: A sentence.
        columns, rows: The table.
    """

    about: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Shown:
    """An evaluation or the first images of a run, to be folded out.

    Attributes:
        title: What they are.
        charts, galleries: Figures and images.
        classes: The table of classes; None if there is none.
        is_evaluation: True for an evaluation.
    """

    title: str
    charts: Sequence[Chart] = ()
    galleries: Sequence[Gallery] = ()
    classes: ClassTable | None = None
    is_evaluation: bool = False


def shown_of(run_dir: Path, label: str) -> list[Shown]:
    """Return the first batch of a run and its evaluations; what is damaged or missing is left out.

    Args:
        run_dir: The run.
        label: Its name in the report.
    """
    first = _galleries(run_dir / FIRST_BATCH_FILE)
    shown = [Shown(f"{label}: first training images", galleries=first)] if first else []
    for file in sorted(run_dir.glob(f"eval-*/{EVALUATION_FILE}")):
        galleries = _galleries(file.parent / MISTAKES_FILE)
        evaluation = _read(file)
        title = f"{label}: evaluation on {file.parent.name.removeprefix('eval-')}{_main_value(evaluation)}"
        charts = _charts(evaluation, f"{run_dir} {file.parent.name}")
        classes = _classes(evaluation)
        if charts or galleries or classes:
            shown.append(Shown(title, charts, galleries, classes, is_evaluation=True))
    return shown


def _main_value(evaluation: dict[str, Any]) -> str:
    """Return `, top-1 76.60 %`; nothing if the file does not say."""
    try:
        main = Metric.build(evaluation["metric_info"][0])
        return f", {main.label} {main.text(evaluation['metrics'][main.name])}"
    except (KeyError, IndexError, TypeError, ValueError, ConfigError):
        return ""


def _charts(evaluation: dict[str, Any], salt: str) -> list[Chart]:
    try:
        names = [str(row["name"]) for row in evaluation.get("classes", ())]
        counts = [[int(number) for number in row] for row in evaluation.get("confusion", ())]
    except (KeyError, TypeError, ValueError, AttributeError):
        return []
    if not names or [len(row) for row in counts] != [len(names)] * len(names):
        return []
    return [Chart(to_markup(confusion_figure(counts, names), f"confusion {salt}"), "Confusion matrix")]


def _classes(evaluation: dict[str, Any]) -> ClassTable | None:
    """Return the classes of a classifier, or the metrics of each class of another task."""
    try:
        if rows := evaluation.get("classes"):
            ordered = sorted(rows, key=lambda row: math.inf if row["accuracy"] is None else row["accuracy"])
            return _worst(
                ("class", "images", "right, %", "precision, %", "mostly mistaken for"), map(_class_row, ordered)
            )
        infos = [Metric.build(info) for info in evaluation.get("metric_info", ())]
        values = [(info, evaluation["metrics"].get(info.name)) for info in infos if info.per_class]
        known = sorted(((info.score(value), info, value) for info, value in values if value is not None), key=_first)
        return _worst(("class", "value"), ([info.label, info.text(value)] for _, info, value in known))
    except (KeyError, TypeError, ValueError, AttributeError, ConfigError):
        return None


def _first(row: tuple[float, Metric, float]) -> float:
    return row[0]


def _class_row(row: dict[str, Any]) -> list[str]:
    mistaken = f"{row['mistaken_for']} ({row['mistakes']})" if row["mistaken_for"] else ""
    return [str(row["name"]), f"{row['num_images']:,}", _percent(row["accuracy"]), _percent(row["precision"]), mistaken]


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _worst(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> ClassTable | None:
    every = list(rows)
    if not every:
        return None
    shown = every[:MAX_CLASSES]
    about = (
        "Classes, the worst first" if len(every) == len(shown) else f"The {len(shown)} worst of {len(every):,} classes"
    )
    return ClassTable(about, columns, shown)


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
