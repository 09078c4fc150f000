"""What a trained model is good at: accuracy by class, what it mistakes for what, and whether it knows when it errs."""

from petune.serving.evaluation.images import confusion_plot, reliability_plot
from petune.serving.evaluation.measures import COLUMNS, Bin, ClassMetrics, Evaluation
from petune.serving.evaluation.run import evaluate, write

__all__ = [
    "COLUMNS",
    "Bin",
    "ClassMetrics",
    "Evaluation",
    "confusion_plot",
    "evaluate",
    "reliability_plot",
    "write",
]
