"""Give prompts a bias of zero in attention that looks up a table of biases, one row for each offset of two tokens.

The forward of the Swin of its authors, and of what copies it, does so itself. No method or module returns the bias, so
the table gets one more row while the forward runs.

Shapes: H heads, N tokens, P prompts, T rows of the table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from petune.injector.hooks.prompt_slot import PromptSlot

Switch = Callable[[bool], None]
"""Changes the attention for prompts (True), or changes it back (False)."""

BIAS_TABLE, BIAS_ROWS = "relative_position_bias_table", "relative_position_index"
"""Attributes: biases (T, H), and the row of the table for each pair of tokens in a window (N, N)."""


def insert(x: Tensor, slot: PromptSlot, dim: int, value: float | Tensor) -> Tensor:
    """Insert a constant where prompts are, along the last dimension (-1) or the last but one (-2)."""
    before, after = x.narrow(dim, 0, slot.index), x.narrow(dim, slot.index, x.shape[dim] - slot.index)
    pad = (0, slot.num_prompts) if dim == -1 else (0, 0, 0, slot.num_prompts)
    constant = 0.0 if isinstance(value, Tensor) else value
    inserted = F.pad(x.narrow(dim, 0, 0), pad, value=constant)
    return torch.cat([before, inserted + value if isinstance(value, Tensor) else inserted, after], dim)


def looks_up_table(module: nn.Module, slot: PromptSlot) -> bool:
    """Tell if a module has a table of biases, and the row of each pair of its tokens."""
    table, rows = module._parameters.get(BIAS_TABLE), module._buffers.get(BIAS_ROWS)
    if table is None or rows is None or table.ndim != 2:
        return False
    window = getattr(module, "window_size", None)
    return rows.numel() == slot.num_tokens**2 and isinstance(window, Sequence) and len(window) == 2


def table_switch(module: Any, slot: PromptSlot) -> Switch:
    """Return a switch for a table of T biases: pairs with prompts look up one more row, of zeros."""
    table = LongerTable(slot, module.window_size)
    handles: list[Any] = []

    def switch(on: bool) -> None:
        if on:
            handles.append(module.register_forward_pre_hook(table.put))
            handles.append(module.register_forward_hook(table.remove, always_call=True))
        while handles and not on:
            handles.pop().remove()

    return switch


@dataclass(frozen=True)
class LongerTable:
    """Hooks on a module that looks up a table: during its forward, attributes hide the table and its indices."""

    slot: PromptSlot
    window: Any

    def put(self, module: nn.Module, args: Any) -> None:
        """Hide the table behind one with a row of zeros, and the window behind one with room for prompts."""
        slot = self.slot
        table_TH = module.get_parameter(BIAS_TABLE)
        longer_TH = torch.cat([table_TH, table_TH.new_zeros(1, table_TH.shape[1])])
        rows_NN = module.get_buffer(BIAS_ROWS).reshape(slot.num_tokens, slot.num_tokens)
        rows = insert(insert(rows_NN, slot, -2, len(table_TH)), slot, -1, len(table_TH))
        window = (1, slot.num_tokens + slot.num_prompts)
        module.__dict__.update({BIAS_TABLE: longer_TH, BIAS_ROWS: rows, "window_size": window})

    def remove(self, module: nn.Module, args: Any, output: Any) -> None:
        """Show the module's own table, indices and window again."""
        module.__dict__.pop(BIAS_TABLE, None)
        module.__dict__.pop(BIAS_ROWS, None)
        module.__dict__["window_size"] = self.window
