"""Draw the two figures of an evaluation: the confusion matrix and the reliability diagram."""

from __future__ import annotations

from typing import TYPE_CHECKING

from petune.base.text import format_percent
from petune.runner.report.confusion import confusion_figure, short_name
from petune.runner.report.plots import COLORS, INK, FileType, draw, to_file
from petune.serving.evaluation.metrics import Evaluation

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def confusion_plot(evaluation: Evaluation, format: FileType = "svg") -> bytes:
    """Draw the confusion matrix: true class by row, predicted class by column, in percent of the row."""
    title = f"{short_name(evaluation.dataset)}, {evaluation.split}: top-1 {format_percent(evaluation.top1)}"
    names = [row.name for row in evaluation.classes]
    return to_file(confusion_figure(evaluation.confusion, names, title), format)


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
