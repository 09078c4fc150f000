"""Decide how many epochs of the Paddle study fit into the time that a GPU is lent for."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import petune
from petune.base.errors import PetuneError
from petune.training.events import StepDone

STAGES = ("pretrain", "frozen", "not_frozen")
MARGIN = 1.1
"""Epochs are expected to take this many times as long as their steps in the warm-up: validation, a slower card."""
FINISH_S = 15.0
"""Time to test and save a stage."""
LEAST_PRETRAINING = 0.25
"""Fine-tuning keeps all its epochs while at least this share of the pretraining fits."""
SKIPPED_STEPS, LEAST_STEPS = 5, 20
"""In the warm-up: the first steps allocate and compile, and a rate needs some steps."""


@dataclass(frozen=True)
class Rate:
    """Speed of training, measured or from a finished stage.

    Attributes:
        epoch_s: Time of an epoch.
        start_s: Time from the call to the first steps.
        compiled: Whether steps were compiled.
    """

    epoch_s: float
    start_s: float
    compiled: bool

    def total_s(self, epochs: int, stages: int) -> float:
        """Return the time of that many epochs in so many stages."""
        return epochs * self.epoch_s * MARGIN + stages * (self.start_s + FINISH_S)

    def epochs_in(self, seconds: float, stages: int) -> float:
        """Return how many epochs fit, over all of the stages."""
        return max(0.0, (seconds - stages * (self.start_s + FINISH_S)) / (self.epoch_s * MARGIN))


class _Measured(Exception):
    """Ends a training that has shown its rate."""


def measure_rate(config: petune.PretrainConfig, seconds: float) -> Rate:
    """Train in a directory of its own for about that time, and return the rate.

    Args:
        config: Its epochs do not matter; its directory is removed.
        seconds: From the call on; a compilation can take longer.
    """
    start, times = time.perf_counter(), []
    steps_per_epoch = 1

    def watch(event: Any) -> None:
        nonlocal steps_per_epoch
        if not isinstance(event, StepDone):
            return
        steps_per_epoch = max(1, event.total_steps // config.train.epochs)
        times.append(time.perf_counter())
        if len(times) >= LEAST_STEPS and times[-1] - start > seconds:
            raise _Measured

    assert config.output is not None
    with contextlib.suppress(_Measured):
        petune.pretrain(config, watch=watch)
    shutil.rmtree(config.output, ignore_errors=True)
    steady = times[min(SKIPPED_STEPS, len(times) - 2) :]
    step_s = (steady[-1] - steady[0]) / max(1, len(steady) - 1)
    return Rate(step_s * steps_per_epoch, steady[0] - start, config.train.compile)


def warm_up(config: petune.PretrainConfig, seconds: float, compile_too: bool) -> tuple[Rate, dict[str, Any]]:
    """Measure steps as they are and compiled; return the rate of the faster ones, compilation included.

    Args:
        config: The pretraining; its output is where the trials are.
        seconds: In all. A quarter is for steps that are not compiled.
        compile_too: Try compiled steps; they need a GPU to pay.
    """
    assert config.output is not None
    rates, failure = [], None
    for compiled in (False, True) if compile_too else (False,):
        trial = config.model_copy(
            update={
                "output": config.output / ("compiled" if compiled else "eager"),
                "train": config.train.model_copy(update={"compile": compiled}),
            }
        )
        try:
            rates.append(measure_rate(trial, seconds * (0.75 if compiled else 0.25)))
        except PetuneError as error:
            if not compiled:
                raise
            failure = str(error)
    best = min(rates, key=lambda rate: rate.total_s(config.train.epochs, len(STAGES)))
    measured = {"compiled" if rate.compiled else "eager": rate.__dict__ for rate in rates}
    return best, {"rates": measured, "compiled": best.compiled, "compile_failure": failure}


def plan_epochs(rate: Rate, seconds: float, wanted: Mapping[str, int]) -> dict[str, int]:
    """Return the epochs of each stage: all that are wanted, or what fits.

    Pretraining is shortened first, down to a quarter, then all stages in proportion.

    Args:
        rate: Of the warm-up. All stages are taken to be as slow as the pretraining; the frozen one is faster.
        seconds: Left for all stages.
        wanted: Epochs of each stage.
    """
    fits = rate.epochs_in(seconds, len(wanted))
    total = sum(wanted.values())
    if fits >= total:
        return dict(wanted)
    pretraining = int(fits) - (total - wanted["pretrain"])
    if pretraining >= LEAST_PRETRAINING * wanted["pretrain"]:
        return {**wanted, "pretrain": pretraining}
    return {stage: max(1, int(fits / total * epochs)) for stage, epochs in wanted.items()}


def epochs_left(rate: Rate, seconds: float, wanted: int, stages: int) -> int:
    """Return the epochs of the next of several stages that share the time; 0 if none fits."""
    return min(wanted, int(rate.epochs_in(seconds, stages) / stages))
