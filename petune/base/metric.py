"""Names and display of metrics, and the metrics of a model on a split."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from petune.base.config import Config
from petune.base.text import format_number, format_percent


class Metric(Config):
    """Name and display of a metric; stored in `result.json`, so that tables need no plugin.

    Attributes:
        name: The key in `metrics`, and in metrics.jsonl after `val_`: `top1`, `macro_f1`, `mae`.
        label: For people: `top-1`, `macro-F1`, `MAE`.
        percent: It is stored and shown in percent.
        higher_is_better: False for errors.
        per_class: It is the value of one class; tables leave it out.
    """

    name: str
    label: str
    percent: bool = False
    higher_is_better: bool = True
    per_class: bool = False

    def score(self, value: float | None) -> float:
        """Return a number that is higher for a better value; minus infinity if there is no value."""
        if value is None:
            return -math.inf
        return value if self.higher_is_better else -value

    def number(self, value: float) -> str:
        """Return the value without its unit, for a table."""
        return f"{value:.2f}" if self.percent else format_number(value)

    def text(self, value: float | None) -> str:
        """Return the value with its unit; `-` for None."""
        if value is None or self.percent:
            return format_percent(value)
        return self.number(value)

    def heading(self, split: str) -> str:
        """Return `top-1 on test, percent`, for the axis of a figure."""
        unit = ", percent" if self.percent else ""
        direction = "" if self.higher_is_better else " (lower is better)"
        return f"{self.label} on {split}{unit}{direction}"


def shown_metrics(metrics: Iterable[Metric]) -> list[Metric]:
    """Return the metrics that tables show: those that are not of one class."""
    return [metric for metric in metrics if not metric.per_class]


LOSS = Metric(name="loss", label="loss", higher_is_better=False)
"""The task's own loss as a metric; every task has it."""


@dataclass(frozen=True)
class SplitMetrics:
    """Metrics and loss of a model on `num_images` images.

    Attributes:
        values: By the metric's name. A metric that is undefined on the split is missing.
        loss: Mean of the task's loss.
        num_images: Size of the split.
        image_values: Values of each image by the name of the metric that their mean is, (N,); of test only.
    """

    values: Mapping[str, float]
    loss: float
    num_images: int
    image_values: Mapping[str, NDArray[np.float32]] = field(default_factory=dict, compare=False)

    def value(self, metric: Metric) -> float | None:
        """Return the value of a metric, or of the loss; None if it is undefined on the split."""
        value = self.values.get(metric.name, self.loss if metric.name == LOSS.name else math.nan)
        return value if math.isfinite(value) else None

    def report(self, metrics: tuple[Metric, ...]) -> dict[str, float]:
        """Return the values to record: all metrics, and the loss if it is among `metrics`."""
        has_loss = any(metric.name == LOSS.name for metric in metrics)
        values = {**({LOSS.name: self.loss} if has_loss else {}), **self.values}
        return {name: float(value) for name, value in values.items() if math.isfinite(value)}
