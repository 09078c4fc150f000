"""What a trained model is good at: accuracy by class, what it mistakes for what, and whether it knows when it errs."""

from petune.serving.evaluation.images import confusion_picture, reliability_picture
from petune.serving.evaluation.measures import COLUMNS, Bin, ClassScore, Evaluation
from petune.serving.evaluation.run import evaluate, write

__all__ = [
    "COLUMNS",
    "Bin",
    "ClassScore",
    "Evaluation",
    "confusion_picture",
    "evaluate",
    "reliability_picture",
    "write",
]
