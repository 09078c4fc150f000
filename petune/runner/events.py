"""Events of commands that do several runs, in addition to the events of training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from petune.training.events import Event


@dataclass(frozen=True)
class RunStarted:
    """Event: the next of several runs starts.

    Attributes:
        method, seed: Of the run; for a trial of a sweep, `method` names the trial and its parameters.
        index, total: Position among the runs, from 0, and how many there are.
        done: The run was finished before; its result is read.
        dataset: Of the run, where runs on several datasets follow each other.
    """

    method: str
    seed: int
    index: int
    total: int
    done: bool
    dataset: str = ""

    @property
    def title(self) -> str:
        """Return `vpt on digits, seed 0`."""
        return f"{self.method}{f' on {self.dataset}' if self.dataset else ''}, seed {self.seed}"


@dataclass(frozen=True)
class RunEvent:
    """Event of one of several runs that are done at the same time.

    Attributes:
        run: The run.
        event: What happened in it.
    """

    run: RunStarted
    event: Event


WatchRuns = Callable[[Event | RunStarted | RunEvent], None]
"""A function that receives every event."""


def on_dataset(dataset: str, watch: WatchRuns) -> WatchRuns:
    """Return `watch` for the runs of one of several datasets: their events name it."""

    def named(event: Event | RunStarted | RunEvent) -> None:
        if isinstance(event, RunStarted):
            event = replace(event, dataset=dataset)
        elif isinstance(event, RunEvent):
            event = replace(event, run=replace(event.run, dataset=dataset))
        watch(event)

    return named
