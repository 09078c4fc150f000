"""Compute metrics from logits and labels.

Shapes: N images, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from petune.base.config import Config
from petune.base.metric import Metric, shown_metrics
from petune.base.text import format_percent, has_top5, html_table

NUM_BINS = 15
"""Bins of the calibration error, as in most papers since Guo et al., 2017 (1706.04599)."""
COLUMNS = ("class", "images", "recall", "precision", "most often predicted as")


class ClassMetrics(Config):
    """Metrics of one class.

    Attributes:
        name: The class.
        num_images: Images of the class.
        accuracy: Percent of its images that were classified correctly, the recall; None without images.
        precision: Percent of the images with this prediction that are of the class; None without such predictions.
        mistaken_for: The most frequent wrong prediction for its images; None if there is none.
        mistakes: Number of images with that prediction.
    """

    name: str
    num_images: int
    accuracy: float | None
    mistaken_for: str | None
    mistakes: int
    precision: float | None = None

    @property
    def f1(self) -> float | None:
        """Harmonic mean of precision and recall, in percent; None without images."""
        if self.accuracy is None:
            return None
        total = self.accuracy + (self.precision or 0)
        return 2 * self.accuracy * (self.precision or 0) / total if total else 0.0

    def cells(self) -> tuple[str, ...]:
        """Return the text of its row, in the order of `COLUMNS`."""
        mistaken = f"{self.mistaken_for} ({self.mistakes})" if self.mistaken_for is not None else "-"
        percents = format_percent(self.accuracy), format_percent(self.precision)
        return self.name, f"{self.num_images:,}", *percents, mistaken


class Bin(Config):
    """Images whose best class has a probability in one interval; means in 0 to 1, None without images."""

    num_images: int
    confidence: float | None
    accuracy: float | None


class Evaluation(Config):
    """Result of an evaluation; saved as `eval.json`. What is of classification only is None or empty for other tasks.

    Attributes:
        method: What was trained.
        task: What it was trained for.
        metrics: The task's metrics by name; one that is undefined on these images is missing.
        metric_info: How to show them, the main one first.
        dataset, split, source: What was evaluated on, and where it was read from.
        num_images: Number of images.
        trained_on: The model was trained on some of them, so the metrics are no measure of other images. It was not if
            they are of its own test split, or if their files have other bytes than those it was trained on; None if
            that is not known: other datasets than folders, adapters without their run directory, and averages of runs
            with other test images.
        num_trained_on: On how many; None if that is not known.
        top1, top5: Accuracy in percent; with fewer than five classes, top5 is 100.
        balanced_accuracy, macro_f1: Means of recall and F1 over the classes with images, in percent.
        loss: Mean of the task's loss.
        calibration_error: Expected calibration error over `NUM_BINS` bins, in percent: the average gap between the
            probability of the predicted class and how often it is right. It, `bins` and `top5` are missing where the
            task of a plugin predicts no probabilities.
        classes: Metrics by class.
        confusion: Number of images by true class (row) and predicted class (column).
        bins: Bins of the reliability diagram.
        precision: Number format of the forward passes.
        run_precision: That of the run's training and test; None if it recorded none.
    """

    method: str
    dataset: str
    split: str
    source: str
    num_images: int
    loss: float
    precision: str
    run_precision: str | None = None
    trained_on: bool | None = None
    num_trained_on: int | None = None
    task: str = "classification"
    metrics: dict[str, float] = {}
    metric_info: tuple[Metric, ...] = ()
    top1: float | None = None
    top5: float | None = None
    balanced_accuracy: float | None = None
    macro_f1: float | None = None
    calibration_error: float | None = None
    classes: tuple[ClassMetrics, ...] = ()
    confusion: tuple[tuple[int, ...], ...] = ()
    bins: tuple[Bin, ...] = ()

    def facts(self) -> list[tuple[str, str]]:
        """Return the main results as names and values."""
        images = f"{self.num_images:,} of {self.dataset}, {self.split}"
        images += self._seen()
        other = self.run_precision not in (None, self.precision)
        precision = f"{self.precision}; the run was tested in {self.run_precision}" if other else self.precision
        facts = [("method", self.method), ("images", images), *self._values()]
        return [*facts, ("loss", f"{self.loss:.4f}"), ("precision", precision)]

    def _seen(self) -> str:
        """Say how many of the images the model was trained on."""
        if self.trained_on is None:
            return "; not known whether the model was trained on them"
        if self.num_trained_on == self.num_images:
            return ", which the model was trained on"
        return f"; the model was trained on {self.num_trained_on:,} of them" if self.num_trained_on else ""

    def class_table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Return columns and rows of the metrics of each class or number, the worst first; empty if there are none.

        What is undefined, because these images do not have the class, is last.
        """
        of_name: dict[str, list[Metric]] = {}
        for metric in self.metric_info:
            if metric.per_class:
                of_name.setdefault(metric.name.partition("/")[2] or metric.name, []).append(metric)
        if not of_name:
            return (), []
        first = {name: metrics[0] for name, metrics in of_name.items()}
        values = {name: self.metrics.get(metric.name) for name, metric in first.items()}
        order = sorted(of_name, key=lambda name: (values[name] is None, first[name].score(values[name])))
        labels = (metric.label.removesuffix(f" of {name}") for name, metrics in of_name.items() for metric in metrics)
        columns = ("class" if first[order[0]].percent else "number", *dict.fromkeys(labels))
        return columns, [(name, *(m.text(self.metrics.get(m.name)) for m in of_name[name])) for name in order]

    def _values(self) -> list[tuple[str, str]]:
        if self.task != "classification":
            shown = shown_metrics(self.metric_info)
            return [(metric.label, metric.text(self.metrics.get(metric.name))) for metric in shown]
        return [
            ("top-1", format_percent(self.top1)),
            *([("top-5", format_percent(self.top5))] if has_top5(len(self.classes)) else ()),
            ("macro accuracy", f"{format_percent(self.balanced_accuracy)}{self._counted()}"),
            ("macro-F1", f"{format_percent(self.macro_f1)}{self._counted()}"),
            ("calibration error", format_percent(self.calibration_error)),
        ]

    def _counted(self) -> str:
        """Say how many classes a mean is over, if some have no images."""
        counted = sum(row.num_images > 0 for row in self.classes)
        return "" if counted == len(self.classes) else f"  (over {counted} of {len(self.classes)} classes)"

    def _repr_html_(self) -> str:
        """Return tables for a notebook."""
        columns, rows = (COLUMNS, [row.cells() for row in self.classes]) if self.classes else self.class_table()
        return html_table(self.facts()) + (html_table(rows, columns) if rows else "")


def compute_metrics(logits_NC: Tensor, labels_N: Tensor, classes: Sequence[str], **about: Any) -> Evaluation:
    """Compute all metrics of an evaluation.

    Args:
        logits_NC: Logits, float32.
        labels_N: Labels, int64.
        classes: Class names in the order of the logits.
        about: The fields of `Evaluation` that do not follow from the logits.
    """
    from torchmetrics.functional.classification import multiclass_accuracy

    num_classes = len(classes)
    bins = calibration_bins(logits_NC.softmax(-1), labels_N)
    about.setdefault("loss", float(nn.functional.cross_entropy(logits_NC, labels_N)))
    top5 = multiclass_accuracy(logits_NC, labels_N, num_classes, average="micro", top_k=min(5, num_classes))
    return compute_class_metrics(
        logits_NC.argmax(1),
        labels_N,
        classes,
        top5=100 * float(top5),
        calibration_error=calibration_error(bins),
        bins=bins,
        **about,
    )


def compute_class_metrics(predicted_N: Tensor, labels_N: Tensor, classes: Sequence[str], **about: Any) -> Evaluation:
    """Compute the metrics that follow from the predicted classes alone.

    Args:
        predicted_N: Predicted classes, int64.
        labels_N: Labels, int64.
        classes: Class names.
        about: The fields of `Evaluation` that do not follow from them.
    """
    from torchmetrics.functional.classification import multiclass_accuracy, multiclass_confusion_matrix

    num_classes = len(classes)
    confusion_CC = multiclass_confusion_matrix(predicted_N, labels_N, num_classes)
    per_class = tuple(_class_metrics(c, confusion_CC, classes) for c in range(num_classes))
    accuracies = [row.accuracy for row in per_class if row.accuracy is not None]
    f1s = [row.f1 for row in per_class if row.f1 is not None]
    about.setdefault("num_images", len(labels_N))
    return Evaluation(
        top1=100 * float(multiclass_accuracy(predicted_N, labels_N, num_classes, average="micro")),
        balanced_accuracy=sum(accuracies) / len(accuracies),
        macro_f1=sum(f1s) / len(f1s),
        classes=per_class,
        confusion=tuple(tuple(row) for row in confusion_CC.tolist()),
        **about,
    )


def calibration_error(bins: Sequence[Bin]) -> float:
    """Return the mean gap between confidence and accuracy, weighted by images, in percent.

    It differs from torchmetrics if a probability is exactly 1, which has a bin of its own there.
    """
    num_images = sum(bin.num_images for bin in bins)
    gaps = [bin.num_images * abs((bin.confidence or 0) - (bin.accuracy or 0)) for bin in bins]
    return 100 * sum(gaps) / num_images


def calibration_bins(probabilities_NC: Tensor, labels_N: Tensor) -> tuple[Bin, ...]:
    """Group images by the probability of their predicted class, in equal intervals (0, 1/15], (1/15, 2/15], …"""
    confidence_N, predicted_N = probabilities_NC.max(-1)
    correct_N = (predicted_N == labels_N).double()
    bin_N = (confidence_N * NUM_BINS).ceil().long().clamp(1, NUM_BINS) - 1
    return tuple(_bin(confidence_N[bin_N == i], correct_N[bin_N == i]) for i in range(NUM_BINS))


def _bin(confidence_N: Tensor, correct_N: Tensor) -> Bin:
    if not len(confidence_N):
        return Bin(num_images=0, confidence=None, accuracy=None)
    confidence, accuracy = float(confidence_N.double().mean()), float(correct_N.mean())
    return Bin(num_images=len(confidence_N), confidence=confidence, accuracy=accuracy)


def _class_metrics(c: int, confusion_CC: Tensor, classes: Sequence[str]) -> ClassMetrics:
    mistakes_C = confusion_CC[c].clone()
    num_images, correct = int(mistakes_C.sum()), int(mistakes_C[c])
    predicted = int(confusion_CC[:, c].sum())
    mistakes_C[c] = 0
    most_frequent = int(mistakes_C.argmax())
    mistakes = int(mistakes_C[most_frequent])
    return ClassMetrics(
        name=classes[c],
        num_images=num_images,
        accuracy=100 * correct / num_images if num_images else None,
        mistaken_for=classes[most_frequent] if mistakes else None,
        mistakes=mistakes,
        precision=100 * correct / predicted if predicted else None,
    )
