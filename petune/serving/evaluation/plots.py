"""Draw the two figures of an evaluation: the confusion matrix and the reliability diagram."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from petune.base.text import matplotlib_text
from petune.runner.report.plots import COLORS, INK, FileType, draw, to_file
from petune.serving.evaluation.metrics import Evaluation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_NAMED, MAX_NUMBERED = 40, 15
"""With up to this many classes, the axes show their names, and the cells their numbers."""
MAX_NAME = 24
"""Longest class name, in characters."""


def confusion_plot(evaluation: Evaluation, format: FileType = "svg") -> bytes:
    """Draw the confusion matrix: true class by row, predicted class by column, in percent of the row."""
    counts = np.array(evaluation.confusion, float)
    percent = 100 * counts / counts.sum(1, keepdims=True).clip(min=1)
    names = [_short_name(row.name) for row in evaluation.classes]
    title = f"{_short_name(evaluation.dataset)}, {evaluation.split}: top-1 {evaluation.top1:.2f} %"
    side = 3.2 + 0.32 * min(len(names), MAX_NAMED)

    def content(figure: Figure) -> None:
        axes = figure.add_subplot()
        image = axes.imshow(percent, cmap="Blues", vmin=0, vmax=100)
        figure.colorbar(image, ax=axes, shrink=0.7, label="percent of the true class")
        if len(names) <= MAX_NAMED:
            axes.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor")
            axes.set_yticks(range(len(names)), names)
        if len(names) <= MAX_NUMBERED:
            for (row, column), value in np.ndenumerate(percent):
                text = f"{value:.0f}" if value >= 0.5 else ""
                axes.text(column, row, text, ha="center", va="center", color="white" if value > 55 else "black")
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        axes.set_title(title)

    return to_file(draw(content, (side + 1, side)), format)


def reliability_plot(evaluation: Evaluation, format: FileType = "svg") -> bytes:
    """Draw the reliability diagram: accuracy over confidence, and below it the number of images."""
    bins, width = evaluation.bins, 1 / len(evaluation.bins)
    centers = [(number + 0.5) * width for number in range(len(bins))]
    filled = [bin for bin in bins if bin.confidence is not None and bin.accuracy is not None]

    def content(figure: Figure) -> None:
        upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 1))
        upper.bar(centers, [bin.accuracy or 0 for bin in bins], 0.92 * width, color=COLORS[0], label="accuracy")
        confidences, accuracies = [bin.confidence for bin in filled], [bin.accuracy for bin in filled]
        upper.plot(confidences, accuracies, ".", color=INK, label="mean of the bin")
        upper.plot((0, 1), (0, 1), "--", color="gray", label="perfect calibration")
        upper.set_ylabel("accuracy")
        upper.set_ylim(0, 1)
        upper.legend(loc="upper left")
        upper.set_title(f"expected calibration error {evaluation.calibration_error:.2f} %")
        lower.bar(centers, [bin.num_images for bin in bins], 0.92 * width, color="gray")
        lower.set_ylabel("images")
        lower.set_xlabel("confidence")
        lower.set_xlim(0, 1)

    return to_file(draw(content, (4.8, 5.0)), format)


def _short_name(name: str) -> str:
    text = matplotlib_text(name)
    return text if len(text) <= MAX_NAME else text[: MAX_NAME - 1] + "…"
