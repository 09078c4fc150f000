"""From logits and labels to numbers.

Shapes: N images, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from petune.base.config import Config
from petune.base.text import format_percent, html_table

NUM_BINS = 15
"""Of the calibration error, as in most papers since Guo et al., 2017 (1706.04599)."""
COLUMNS = ("class", "images", "accuracy", "mistaken most for")


class ClassMetrics(Config):
    """One class.

    Attributes:
        accuracy: Percent of its images that got its name; None without images.
        mistaken_for: The class that most of its other images were taken for, if there are such.
        mistakes: How many were.
    """

    name: str
    num_images: int
    accuracy: float | None
    mistaken_for: str | None
    mistakes: int

    def cells(self) -> tuple[str, str, str, str]:
        """The text of its row, in the order of `COLUMNS`."""
        mistaken = f"{self.mistaken_for} ({self.mistakes})" if self.mistaken_for is not None else "-"
        return self.name, f"{self.num_images:,}", format_percent(self.accuracy), mistaken


class Bin(Config):
    """Images whose best class had a probability in one of equal intervals; means in 0 to 1, None without any."""

    num_images: int
    confidence: float | None
    accuracy: float | None


class Evaluation(Config):
    """What a model is good at; saved as `eval.json`.

    Attributes:
        dataset, split, source: What it was evaluated on, and where that was read from.
        top1, top5: Percent; with fewer than five classes top5 is the top-C accuracy.
        balanced: Mean of the classes' accuracies, percent.
        loss: Mean cross-entropy.
        calibration_error: Expected calibration error over `NUM_BINS` bins, in percent: how far, on average, the
            probability of the best class is from how often it is right.
        confusion: Row: the true class; column: the class that was named; images.
        precision: The number format of the forward passes.
    """

    method: str
    dataset: str
    split: str
    source: str
    num_images: int
    top1: float
    top5: float
    balanced: float
    loss: float
    calibration_error: float
    classes: tuple[ClassMetrics, ...]
    confusion: tuple[tuple[int, ...], ...]
    bins: tuple[Bin, ...]
    precision: str

    def facts(self) -> list[tuple[str, str]]:
        """What a reader wants to know, as names and values."""
        return [
            ("method", self.method),
            ("images", f"{self.num_images:,} of {self.dataset}, {self.split}"),
            ("top-1", format_percent(self.top1)),
            ("top-5", format_percent(self.top5)),
            ("mean of classes", format_percent(self.balanced)),
            ("loss", f"{self.loss:.4f}"),
            ("calibration error", format_percent(self.calibration_error)),
        ]

    def _repr_html_(self) -> str:
        """How a notebook shows it."""
        return html_table(self.facts()) + html_table([one.cells() for one in self.classes], COLUMNS)


def measured(logits_NC: Tensor, labels_N: Tensor, names: Sequence[str], **about: str) -> Evaluation:
    """All numbers of an evaluation.

    Args:
        logits_NC: Logits, float32.
        labels_N: int64.
        names: Of the classes, in the order of the logits.
        about: The fields that no logit tells.
    """
    from torchmetrics.functional.classification import (
        multiclass_accuracy,
        multiclass_confusion_matrix,
    )

    num_classes, chances_NC = len(names), logits_NC.softmax(-1)
    confusion = multiclass_confusion_matrix(logits_NC, labels_N, num_classes)
    classes = tuple(_class_metrics(c, confusion, names) for c in range(num_classes))
    known = [one.accuracy for one in classes if one.accuracy is not None]

    def top(k: int) -> float:
        return 100 * float(multiclass_accuracy(logits_NC, labels_N, num_classes, average="micro", top_k=k))

    bins = bins_of(chances_NC, labels_N)
    return Evaluation(
        num_images=len(labels_N),
        top1=top(1),
        top5=top(min(5, num_classes)),
        balanced=sum(known) / len(known),
        loss=float(nn.functional.cross_entropy(logits_NC, labels_N)),
        calibration_error=calibration_error(bins),
        classes=classes,
        confusion=tuple(tuple(row) for row in confusion.tolist()),
        bins=bins,
        **about,
    )


def calibration_error(bins: Sequence[Bin]) -> float:
    """Mean distance of confidence and accuracy, by images, in percent.

    Of torchmetrics' it differs where a probability is exactly 1, which has a bin of its own there.
    """
    total = sum(one.num_images for one in bins)
    return 100 * sum(one.num_images * abs((one.confidence or 0) - (one.accuracy or 0)) for one in bins) / total


def bins_of(chances_NC: Tensor, labels_N: Tensor) -> tuple[Bin, ...]:
    """How often the best class is right, by how probable it was said to be."""
    confidence_N, named_N = chances_NC.max(-1)
    right_N = (named_N == labels_N).double()
    place_N = (confidence_N * NUM_BINS).ceil().long().clamp(1, NUM_BINS) - 1  # (0, 1/15], (1/15, 2/15], …
    bins = []
    for number in range(NUM_BINS):
        inside = place_N == number
        count = int(inside.sum())
        means = (float(confidence_N[inside].double().mean()), float(right_N[inside].mean())) if count else (None, None)
        bins.append(Bin(num_images=count, confidence=means[0], accuracy=means[1]))
    return tuple(bins)


def _class_metrics(c: int, confusion_CC: Tensor, names: Sequence[str]) -> ClassMetrics:
    row = confusion_CC[c].clone()
    total, right = int(row.sum()), int(row[c])
    row[c] = 0
    most = int(row.argmax())
    mistakes = int(row[most])
    return ClassMetrics(
        name=names[c],
        num_images=total,
        accuracy=100 * right / total if total else None,
        mistaken_for=names[most] if mistakes else None,
        mistakes=mistakes,
    )


def gathered(batches: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Logits and labels of all batches, on the CPU."""
    return torch.cat([logits.cpu() for logits, _ in batches]), torch.cat([labels.cpu() for _, labels in batches])
