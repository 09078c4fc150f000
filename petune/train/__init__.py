"""Training: configuration, optimizer and schedule, the loop, evaluation, precision, checkpoints."""

from petune.train.config import TrainConfig
from petune.train.evaluate import Accuracy, evaluate
from petune.train.events import EpochEnded, Event, Note, StepDone
from petune.train.loop import Trainer
from petune.train.precision import choose_device, choose_precision
from petune.train.progress import Fitted
from petune.train.stop import StopFlag

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
