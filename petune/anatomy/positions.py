"""What must be told to a block's attention when tokens without a position (prompts) come in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from petune.errors import AttachError
from petune.sites import Block, Sites

Switch = Callable[[bool], None]


def admit_prompts(block: Block, sites: Sites, count: int) -> list[Switch]:
    """Prepare one block for `count` tokens behind its prefix, or refuse.

    Args:
        block: The block that prompts pass through.
        sites: Those of the whole model.
        count: Number of prompts.

    Returns:
        Switches that tell the attention (True) or take it back (False).

    Raises:
        AttachError: The block cannot take them, with the reason.
    """
    reason = _refusal(block)
    if reason is not None:
        raise AttachError(
            f"prompts are tokens that a block sees beside its patches, but {block.path} of {sites.model} {reason}. "
            "Use a method without prompts, such as adaptformer"
        )
    attention = block.enter if block.attn is None else block.attn.enter
    switches: list[Switch] = []
    for module in attention.modules():
        # the two attributes by which timm's attentions know positions; nothing in the trace could tell them
        if isinstance(getattr(module, "num_prefix_tokens", None), int):
            switches.append(_grow_prefix(module, count))
        if callable(getattr(module, "_get_rel_pos_bias", None)) and hasattr(module, "relative_position_bias_table"):
            switches.append(_pad_bias(module, sites.num_prefix_tokens, count))
    return switches


def _refusal(block: Block) -> str | None:
    if not block.is_module:
        return "is no module of its own that they could enter and leave"
    if block.layout != "BNC":
        return f"lays its tokens out as a picture ({block.layout})"
    spatial = [n for n, m in block.enter.named_modules() if isinstance(m, nn.Conv1d | nn.Conv2d) and _is_spatial(m)]
    if spatial:
        return f"convolves over the picture ({spatial[0]})"
    knows = block.attn is not None and any(hasattr(m, "num_prefix_tokens") for m in block.attn.enter.modules())
    if block.takes_extra and not knows:
        return f"is given further tensors ({', '.join(block.takes_extra)}) that may be sized for its tokens"
    return None


def _is_spatial(conv: nn.Conv1d | nn.Conv2d) -> bool:
    return any(k > 1 for k in conv.kernel_size)


def _grow_prefix(module: Any, count: int) -> Switch:
    """Rotary embeddings leave the first `num_prefix_tokens` alone: prompts are among them."""

    def switch(on: bool) -> None:
        module.num_prefix_tokens += count if on else -count

    return switch


def _pad_bias(module: Any, index: int, count: int) -> Switch:
    """A table of relative positions has no entry for prompts: their bias is zero."""
    padded = PaddedBias(module, index, count)

    def switch(on: bool) -> None:
        if on:
            padded.before = module.__dict__.get("_get_rel_pos_bias")
            module._get_rel_pos_bias = padded.get
        elif padded.before is not None:
            module._get_rel_pos_bias = padded.before
        else:
            del module._get_rel_pos_bias

    return switch


class PaddedBias:
    """Stands in for an attention's `_get_rel_pos_bias`. Copies follow the module they are in."""

    def __init__(self, module: Any, index: int, count: int) -> None:
        self.module, self.index, self.count = module, index, count
        self.before: Callable[[], Tensor] | None = None

    def get(self) -> Tensor:
        """The bias (1, heads, N + P, N + P), zero in the rows and columns of the prompts."""
        own = (
            self.before
            if self.before is not None
            else functools.partial(type(self.module)._get_rel_pos_bias, self.module)
        )
        bias, i = own(), self.index
        rows = torch.cat([bias[..., :i, :], F.pad(bias[..., :0, :], (0, 0, 0, self.count)), bias[..., i:, :]], -2)
        return torch.cat([rows[..., :i], F.pad(rows[..., :0], (0, self.count)), rows[..., i:]], -1)
