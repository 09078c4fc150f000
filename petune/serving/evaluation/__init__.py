"""Evaluate a trained model: recall and precision by class, confusion matrix, calibration."""

from petune.serving.evaluation.evaluate_run import evaluate, write_evaluation
from petune.serving.evaluation.metrics import COLUMNS, Bin, ClassMetrics, Evaluation, compute_metrics
from petune.serving.evaluation.plots import confusion_plot, reliability_plot

__all__ = [
    "COLUMNS",
    "Bin",
    "ClassMetrics",
    "Evaluation",
    "compute_metrics",
    "confusion_plot",
    "evaluate",
    "reliability_plot",
    "write_evaluation",
]
