"""Draw a confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from petune.base.text import matplotlib_text
from petune.runner.report.plots import WIDTH, draw

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_NAMED, MAX_NUMBERED = 40, 15
"""With up to this many classes, the axes show their names, and the cells their numbers."""
MAX_NAME = 24
"""Longest class name, in characters."""


def confusion_figure(counts: Sequence[Sequence[int]], classes: Sequence[str], title: str = "") -> Figure:
    """Draw the true class by row and the predicted class by column, in percent of the row.

    Args:
        counts: Number of images by true and predicted class.
        classes: Their names.
        title: Above the matrix.
    """
    numbers = np.array(counts, float)
    percent = 100 * numbers / numbers.sum(1, keepdims=True).clip(min=1)
    names = [short_name(name) for name in classes]
    named, numbered = len(names) <= MAX_NAMED, len(names) <= MAX_NUMBERED
    side = 1.4 + (0.3 if numbered else 0.22) * len(names) if named else WIDTH

    def content(figure: Figure) -> None:
        axes = figure.add_subplot()
        image = axes.imshow(percent, cmap="Blues", vmin=0, vmax=100)
        if named:
            axes.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor")
            axes.set_yticks(range(len(names)), names)
        if not numbered:
            figure.colorbar(image, ax=axes, shrink=0.7, label="percent of the true class")
        else:
            for (row, column), value in np.ndenumerate(percent):
                text = f"{value:.0f}" if value >= 0.5 else ""
                axes.text(
                    column,
                    row,
                    text,
                    ha="center",
                    va="center",
                    fontsize="small",
                    color="white" if value > 55 else "black",
                )
        axes.set_xlabel("predicted")
        axes.set_ylabel("true (percent of each row)" if numbered else "true")
        axes.set_title(title)

    return draw(content, (max(side, WIDTH), max(side, WIDTH)))


def short_name(name: str) -> str:
    """Return a name that fits an axis."""
    text = matplotlib_text(name)
    return text if len(text) <= MAX_NAME else text[: MAX_NAME - 1] + "…"
