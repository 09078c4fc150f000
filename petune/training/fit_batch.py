"""Find the largest micro-batch that fits into a device's memory, once before training."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from petune.base.errors import ConfigError


def can_run_out(device: torch.device) -> bool:
    """Return whether running out of memory is an error that can be caught. On a CPU it ends the process."""
    return device.type == "cuda"


def largest_that_fits(step: Callable[[int], object], batch_size: int, parameters: Sequence[nn.Parameter]) -> int:
    """Return the largest of batch_size, its half, its quarter, … for which `step(size)` does not run out of memory.

    Args:
        step: Runs forward and backward of that many images.
        batch_size: Images per optimizer step.
        parameters: What trains; room for two moments of an optimizer is held meanwhile.

    Raises:
        ConfigError: Not even one image fits.
    """
    size = batch_size
    error = _out_of_memory(step, size, parameters)
    while error and size > 1:
        size = max(1, size // 2)
        error = _out_of_memory(step, size, parameters)
    if error:
        raise ConfigError(
            f"out of memory: not even one image fits ({error}). Use a smaller backbone, image_size, or device cpu"
        )
    return size


def explain_single_image(error: ValueError, x: Tensor, model: nn.Module) -> ConfigError | None:
    """Explain why the forward failed, if a BatchNorm that trains was given a single image: it has no variance.

    Args:
        error: What the forward raised.
        x: What the forward was given, (B, …).
        model: The model in train mode.
    """
    if len(x) > 1 or not any(isinstance(m, _BatchNorm) and m.training for m in model.modules()):
        return None
    return ConfigError(
        "BatchNorm that trains needs at least two images at a time, but a batch, or a micro-batch, has a single one "
        f"({error}). Use another train.batch_size or train.micro_batch_size, or head linear"
    )


def _out_of_memory(step: Callable[[int], object], size: int, parameters: Sequence[nn.Parameter]) -> str:
    """Return torch's message if a step of `size` images does not fit, else an empty string."""
    try:
        moments = [torch.empty_like(p) for p in parameters for _ in range(2)]
        step(size)
        del moments
    except torch.OutOfMemoryError as error:
        return str(error).splitlines()[0]
    finally:
        for device in {p.device for p in parameters if p.is_cuda}:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)  # what did not fit is not part of the run
    return ""
