"""Training: configuration, optimizer and schedule, the loop, evaluation, precision, checkpoints."""

from petune.training.config import TrainConfig
from petune.training.evaluate import Accuracy, evaluate
from petune.training.events import EpochEnded, Event, Note, StepDone
from petune.training.job import TrainJob
from petune.training.loop import Trainer
from petune.training.precision import choose_device, choose_precision
from petune.training.progress import FitResult
from petune.training.stop import StopFlag

__all__ = [
    "Accuracy",
    "EpochEnded",
    "Event",
    "FitResult",
    "Note",
    "StepDone",
    "StopFlag",
    "TrainConfig",
    "TrainJob",
    "Trainer",
    "choose_device",
    "choose_precision",
    "evaluate",
]
