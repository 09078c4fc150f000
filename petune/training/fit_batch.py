"""How large a micro-batch fits a device's memory, found out once before training and never changed in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from petune.base.errors import ConfigError


def can_run_out(device: torch.device) -> bool:
    """Whether a full memory is an error there that can be caught; a full main memory ends the process."""
    return device.type == "cuda"


def largest_that_fits(step: Callable[[int], object], batch_size: int, parameters: Sequence[nn.Parameter]) -> int:
    """The largest of batch_size, its half, its quarter, … for which `step(size)` does not run out of memory.

    Args:
        step: Forward and backward of so many images.
        batch_size: Images of an optimizer step.
        parameters: What trains; room for an optimizer's two moments is held meanwhile.

    Raises:
        ConfigError: Not even one image fits.
    """
    size, reason = batch_size, _problem(step, batch_size, parameters)
    while reason and size > 1:
        size = max(1, size // 2)
        reason = _problem(step, size, parameters)
    if reason:
        raise ConfigError(
            f"a training step must fit the device's memory, but one image does not: {reason} Use a smaller "
            "--backbone or --image-size, or --device cpu"
        )
    return size


@contextmanager
def statistics_need_two() -> Iterator[None]:
    """Say of a batch, or a last piece of one, that is a single image why BatchNorm in a classifier cannot use it.

    Raises:
        ConfigError: That came up.
    """
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ConfigError(
            "BatchNorm that trains needs two images or more at a time, but a batch, or what train.micro_batch_size "
            f"leaves of one, has a single image ({error}). Use another train.batch_size or train.micro_batch_size, "
            "or --head linear"
        ) from error


def _problem(step: Callable[[int], object], size: int, parameters: Sequence[nn.Parameter]) -> str:
    """Why a step of `size` images does not fit, or nothing."""
    try:
        moments = [torch.empty_like(p) for p in parameters for _ in range(2)]
        step(size)
        del moments
    except torch.OutOfMemoryError as error:
        return str(error).splitlines()[0]
    finally:
        for device in {p.device for p in parameters if p.is_cuda}:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)  # what did not fit is not the run's
    return ""
