"""Events of commands that do several runs, in addition to the events of training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from petune.training.events import Event


@dataclass(frozen=True)
class RunStarted:
    """Event: the next of several runs starts.

    Attributes:
        method, seed: Of the run; for a trial of a sweep, `method` names the trial and its parameters.
        index, total: Position among the runs, from 0, and how many there are.
        done: The run was finished before; its result is read.
    """

    method: str
    seed: int
    index: int
    total: int
    done: bool


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
