"""The two images of an evaluation: which class is taken for which, and how far probabilities can be believed."""

from __future__ import annotations

import io
from typing import Any, Literal

import numpy as np

from petune.base.text import matplotlib_text
from petune.serving.evaluation.measures import Evaluation

Kind = Literal["svg", "png"]
NAMED, NUMBERED = 40, 15
"""Up to so many classes have their names beside the image, and their numbers in it."""


def confusion_plot(evaluation: Evaluation, kind: Kind = "svg") -> bytes:
    """Row: the true class; column: what its images were taken for, in percent of the row."""
    counts = np.array(evaluation.confusion, float)
    share = 100 * counts / counts.sum(1, keepdims=True).clip(min=1)
    names, number = [_short(one.name) for one in evaluation.classes], len(counts)
    side = 3.2 + 0.32 * min(number, NAMED)

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        image = axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
        figure.colorbar(image, ax=axes, shrink=0.7, label="percent of the true class")
        if number <= NAMED:
            axes.set_xticks(range(number), names, rotation=60, ha="right", rotation_mode="anchor")
            axes.set_yticks(range(number), names)
        if number <= NUMBERED:
            for (row, column), value in np.ndenumerate(share):
                shown = f"{value:.0f}" if value >= 0.5 else ""
                axes.text(column, row, shown, ha="center", va="center", color="white" if value > 55 else "black")
        axes.set_xlabel("named")
        axes.set_ylabel("true")
        axes.set_title(f"{_short(evaluation.dataset)}, {evaluation.split}: top-1 {evaluation.top1:.2f} %")

    return _drawn(draw, (side + 1, side), kind)


def reliability_plot(evaluation: Evaluation, kind: Kind = "svg") -> bytes:
    """How often the best class is right over how probable it was said to be; below, how many images that were."""
    bins, width = evaluation.bins, 1 / len(evaluation.bins)
    middles = [(number + 0.5) * width for number in range(len(bins))]

    def draw(figure: Any) -> None:
        upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 1))
        upper.bar(middles, [one.accuracy or 0 for one in bins], 0.92 * width, label="how often right")
        filled = [one for one in bins if one.confidence is not None]
        upper.plot([one.confidence for one in filled], [one.accuracy for one in filled], "k.", label="mean in the bin")
        upper.plot((0, 1), (0, 1), "--", color="grey", label="as probable as right")
        upper.set_ylabel("accuracy")
        upper.set_ylim(0, 1)
        upper.legend(loc="upper left", fontsize=8)
        upper.set_title(f"expected calibration error {evaluation.calibration_error:.2f} %")
        lower.bar(middles, [one.num_images for one in bins], 0.92 * width, color="grey")
        lower.set_ylabel("images")
        lower.set_xlabel("probability of the best class")
        lower.set_xlim(0, 1)

    return _drawn(draw, (4.8, 5.0), kind)


def _drawn(draw: Any, inches: tuple[float, float], kind: Kind) -> bytes:
    import matplotlib
    from matplotlib.figure import Figure

    # A fixed salt and no date: the same numbers give the same bytes.
    style = {"svg.hashsalt": "petune", "svg.fonttype": "none", "text.parse_math": False, "font.size": 9.0}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=inches, layout="constrained")
        draw(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else {"Software": None})
    return buffer.getvalue()


def _short(name: str) -> str:
    """What matplotlib's font can draw, at most 24 letters of it."""
    plain = matplotlib_text(name)
    return plain if len(plain) <= 24 else plain[:23] + "…"
