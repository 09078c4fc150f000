"""Where many runs are done: here one after the other, on a Ray cluster, or by Slurm.

An executor takes configurations and yields what became of each; the run directories, and so the results, are the same
wherever it happens. `run_all` is the way in. Other `Work` than a run is done in the same way: a sweep only trains.
"""

from petune.runner.executors.choose import EXECUTORS, choose_executor, run_all
from petune.runner.executors.trial import RUN, Executor, Failure, Outcome, Started, Work, serial

__all__ = [
    "EXECUTORS",
    "RUN",
    "Executor",
    "Failure",
    "Outcome",
    "Started",
    "Work",
    "choose_executor",
    "run_all",
    "serial",
]
