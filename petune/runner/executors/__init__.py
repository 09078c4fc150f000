"""Executors of many runs: here one after the other or several at a time, on a Ray cluster, or by Slurm.

An executor takes configurations and yields the result of each. Run directories and results are the same wherever the
runs are done. Start with `run_all`. `Work` other than a whole run is possible: a sweep only trains.
"""

from petune.runner.executors.choose import EXECUTORS, choose_executor, run_all
from petune.runner.executors.executor import RUN, Executor, Failure, FromRun, Outcome, Started, Work, serial

__all__ = [
    "EXECUTORS",
    "RUN",
    "Executor",
    "Failure",
    "FromRun",
    "Outcome",
    "Started",
    "Work",
    "choose_executor",
    "run_all",
    "serial",
]
