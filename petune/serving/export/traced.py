"""Trace a model, and check that an exported file computes what the model computes.

Shapes: B batch, S side of an image, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from petune.base.errors import ExportError
from petune.sites.input_spec import InputSpec
from petune.sites.logits import logits_of

BATCH = "batch"
MAX_DIFFERENCE = 1e-4
"""Relative to the largest logit. Other kernels add in another order; real errors are much larger."""


@dataclass(frozen=True)
class OutputCheck:
    """Images (B, 3, S, S) in batches of several sizes, and the logits of the trained model for each batch."""

    images: tuple[Tensor, ...]
    expected: tuple[Tensor, ...]

    @classmethod
    def of(cls, model: nn.Module, spec: InputSpec) -> OutputCheck:
        """Run the model on fixed random images.

        Raises:
            ExportError: It takes more than one tensor.
        """
        if not spec.is_plain:
            raise ExportError(f"the model takes {spec}, and only models that take one tensor can be exported")
        sizes = (2, 1, 5)  # the first batch is the one that is traced
        images = tuple(x for seed, n in enumerate(sizes) for x in spec.noise(n, seed).tensors)
        with torch.no_grad():
            return cls(images, tuple(logits_of(model(x)) for x in images))

    def difference(self, compute: Callable[[Tensor], Tensor], name: str) -> float:
        """Return the largest difference between logits, relative to the largest logit (or 1).

        Args:
            compute: What was exported.
            name: What to call it in messages.

        Raises:
            ExportError: The difference is above `MAX_DIFFERENCE`.
        """
        largest = 0.0
        with torch.no_grad():
            for x_B3SS, expected_BC in zip(self.images, self.expected, strict=True):
                logits_BC = logits_of(compute(x_B3SS))
                if logits_BC.shape != expected_BC.shape:
                    shapes = f"{tuple(logits_BC.shape)} instead of {tuple(expected_BC.shape)}"
                    raise ExportError(f"{name} returns logits of shape {shapes}. Nothing was written")
                error = (logits_BC - expected_BC).abs().max() / expected_BC.abs().max().clamp(min=1)
                largest = max(largest, float(error))
        if not largest <= MAX_DIFFERENCE:  # NaN as well
            raise ExportError(
                f"{name} differs from the model by {largest:.2g} of the largest logit; at most {MAX_DIFFERENCE:g} is "
                "allowed. Nothing was written"
            )
        return largest


class _Logits(nn.Module):
    """Wrap a model so that it returns bare logits (transformers' models return an object)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Classify images: (B, 3, S, S) to (B, C)."""
        return logits_of(self.model(images))


def trace(model: nn.Module, check: OutputCheck) -> Any:
    """Trace a model with a variable batch size.

    Raises:
        ExportError: torch.export cannot trace it.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    try:
        with torch.no_grad():
            return torch.export.export(
                _Logits(model), (check.images[0],), dynamic_shapes=({0: torch.export.Dim(BATCH)},)
            )
    except Exception as error:  # torch.export raises a dozen types, and each means that it cannot trace this model
        raise ExportError(
            f"torch.export cannot trace the model with a variable batch size: {type(error).__name__}: "
            f"{first_line(error)}",
            cli_hint="--debug shows where",
        ) from error


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return next(iter(str(error).strip().splitlines()), "no reason given")
