"""The addition of PEFT's LoRA to the output of a linear layer, without the layer itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def is_plain_lora(layer: Any, adapter: str) -> bool:
    """Return True if the adapter is `W x + (α/r) · B A x`: LoRA of a linear layer, and no variant such as DoRA."""
    from peft.tuners.lora.layer import Linear

    return type(layer) is Linear and adapter in layer.lora_A and adapter not in layer.lora_variant


def lora_addition(layer: Any, adapter: str) -> Callable[[Tensor], Tensor]:
    """Return a function from the layer's input to what the adapter adds to its output."""

    def addition(x: Tensor) -> Tensor:
        down, up = layer.lora_A[adapter], layer.lora_B[adapter]
        hidden = down(layer.lora_dropout[adapter](layer._cast_input_dtype(x, down.weight.dtype)))
        change: Tensor = up(hidden) * layer.scaling[adapter]
        return change

    return addition
