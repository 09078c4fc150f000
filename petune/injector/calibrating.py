"""Call `Tuner.calibrate`: the model is as before afterwards, except for what the method has chosen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from petune.injector.calibration import CalibrationBatches, CalibrationState, Loss
from petune.injector.edit_log import EditLog
from petune.injector.registry import call_hook
from petune.injector.trainable import host_for
from petune.injector.tuner import Tuner
from petune.sites.forward import device_of

SEED = 0
"""Seed of what a tuner draws while it calibrates, so that every process and every repetition draws the same."""


def add_calibration_state(model: nn.Module, log: EditLog) -> None:
    """Put the record into the model."""
    host, name = host_for(model), f"petune_{log.label}_calibration"
    state = CalibrationState(device_of(model))
    host.add_module(name, state)
    log.undo_steps.append(lambda: delattr(host, name))
    log.added_modules.append(state)
    log.calibration = state


def calibrate(model: nn.Module, tuner: Tuner[Any], log: EditLog, batches: Iterable[Any], loss: Loss | None) -> None:
    """Let a tuner choose what it trains; see `Attachment.calibrate`."""
    given = CalibrationBatches(model, batches, loss)
    with calibrating(model, log):
        call_hook(tuner, "calibrate", given)
    if log.calibration is not None:
        log.calibration.done.fill_(1)


@contextmanager
def calibrating(model: nn.Module, log: EditLog) -> Iterator[None]:
    """Run the model in eval mode, with fixed random numbers and full gradients; the state is as before afterwards.

    If it fails, what the method had chosen by then is undone.
    """
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(p, p.grad) for p in model.parameters()]
    saved = [(t, t.detach().clone()) for t in log.new_tensors()]
    try:
        device = device_of(model)
        cuda = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda), torch.enable_grad(), log.full_gradients():
            torch.manual_seed(SEED)
            for module, _ in modes:
                module.training = False
            for p, _ in gradients:  # a backward adds to what is there
                p.grad = None
            yield
    except BaseException:
        with torch.no_grad():
            for tensor, value in saved:
                tensor.copy_(value)
        raise
    finally:
        for module, mode in modes:
            module.training = mode
        for p, gradient in gradients:
            p.grad = gradient
