"""Training: configuration, optimizer and schedule, the loop, evaluation, precision, checkpoints."""

from petune.training.config import TrainConfig
from petune.training.evaluate import Accuracy, evaluate
from petune.training.events import EpochEnded, Event, Note, StepDone
from petune.training.loop import Trainer
from petune.training.precision import choose_device, choose_precision
from petune.training.progress import Fitted
from petune.training.stop import StopFlag

__all__ = [
    "Accuracy",
    "EpochEnded",
    "Event",
    "Fitted",
    "Note",
    "StepDone",
    "StopFlag",
    "TrainConfig",
    "Trainer",
    "choose_device",
    "choose_precision",
    "evaluate",
]
