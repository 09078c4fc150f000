"""Evaluate a trained model: recall and precision by class, confusion matrix, calibration."""

from petune.serving.evaluation.eval_images import EvalRequest, select_images
from petune.serving.evaluation.evaluate_run import evaluate
from petune.serving.evaluation.evaluated import Evaluated, evaluate_images
from petune.serving.evaluation.files import write_evaluation
from petune.serving.evaluation.metrics import COLUMNS, Bin, ClassMetrics, Evaluation, compute_metrics
from petune.serving.evaluation.plots import confusion_plot, reliability_plot

__all__ = [
    "COLUMNS",
    "Bin",
    "ClassMetrics",
    "EvalRequest",
    "Evaluated",
    "Evaluation",
    "compute_metrics",
    "confusion_plot",
    "evaluate",
    "evaluate_images",
    "reliability_plot",
    "select_images",
    "write_evaluation",
]
