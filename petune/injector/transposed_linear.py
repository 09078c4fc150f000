"""transformers' Conv1D: a linear layer, y = x W + b, that holds its weight as (inputs, outputs)."""

from __future__ import annotations

from torch import nn


def is_transposed_linear(module: nn.Module) -> bool:
    """Return whether a module is transformers' Conv1D, without importing transformers."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"
