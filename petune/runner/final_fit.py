"""The final fit: when val has chosen the epoch, train again on train and val up to that epoch, and test that model.

This is the protocol of VTAB (Zhai et al., 2019, arXiv:1910.04867), whose 1,000 training images are divided into
train800 and val200 to choose, and used together to train what is tested. What val chooses in a run is the epoch, and a
task's thresholds if it has any. Everything else is the same in both trainings: initial values, seed, learning rate and
its schedule over all epochs of the configuration, of which the second training runs the chosen number.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from petune.base.text import plural
from petune.data.dataset import Dataset
from petune.runner.file_names import FINAL_FIT_DIR
from petune.runner.prepare import RunContext
from petune.training.progress import FitResult
from petune.training.task import Task


@dataclass(frozen=True)
class Chosen:
    """Choices of a first training.

    Attributes:
        fit: Its result.
        state: Of its task, with what was calibrated on val.
    """

    fit: FitResult
    state: dict[str, Any]

    def note(self, dataset: Dataset) -> str:
        """Return the sentence that a run shows before its second training, on this dataset."""
        return (
            f"val chose epoch {self.fit.epoch} of {len(self.fit.epochs)}; the model that is tested trains again, on "
            f"the {plural(len(dataset.train), 'image')} of train and val, up to that epoch"
        )

    def finish(self, final: FitResult, task: Task[Any], fitted: dict[str, Any]) -> FitResult:
        """Give a task what was calibrated on val, and return the result of both trainings.

        Args:
            final: The result of the second training.
            task: Of the second training.
            fitted: Its state before that.
        """
        task.bind(task.target, {**task.state, **{k: value for k, value in self.state.items() if k not in fitted}})
        first = self.fit
        return replace(
            final,
            epoch=first.epoch,
            val=first.val,
            epochs=first.epochs,
            stopped_early=first.stopped_early,
            time_s=first.time_s + final.time_s,
        )


def note_of_one_fit(dataset: Dataset, epochs: int) -> str:
    """Return the sentence that a run shows before its only training, on train and val: a dataset without val."""
    return (
        f"all {plural(len(dataset.train), 'image')} of train and val train for {plural(epochs, 'epoch')}, and the last "
        "one is tested: val chooses nothing"
    )


def make_final_dir(context: RunContext) -> RunContext:
    """Return the context of the second training, whose files are in a folder of the run directory."""
    directory = context.run_dir / FINAL_FIT_DIR
    context.group.broadcast(lambda: directory.mkdir(exist_ok=True))
    return replace(context, run_dir=directory)
