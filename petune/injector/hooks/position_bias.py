"""Make attention that depends on positions ignore prompts, which have no position.

Attention knows positions in one of a few ways: tables of rotations (RoPE), a bias for each pair of tokens, a number of
prefix tokens that are not rotated. For a block with prompts each is changed so that prompts are not rotated and have a
bias of zero to and from every token. `prompt_check` then verifies that nothing was missed.

Hooks and methods are bound to small objects, so that they follow a deep copy of the model.
Shapes: H heads, N tokens, P prompts, T rows of a table.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from petune.injector.hooks.bias_tables import Switch, insert, looks_up_table, table_switch
from petune.injector.hooks.prompt_slot import PromptSlot, enters_attention_only, prompts_refused
from petune.sites.site import Block
from petune.sites.sites import Sites

# Ways to use positions that neither shapes nor the trace show, with the timm classes that have them:
PREFIX = "num_prefix_tokens"  # number of tokens that are not rotated (EVA, ROPE ViT, DINOv3, Qwen3)
# methods that return a bias (1 or none, H, N, N) (BEiT and Swin; relpos; TinyViT, LeViT, EfficientViT):
BIAS_METHODS = ("_get_rel_pos_bias", "get_bias", "get_attention_biases")
# networks that compute the bias of a window (Swin-V2; Swin-V2 CR; transformers' Swin-V2):
BIAS_MLPS = ("cpb_mlp", "meta_mlp", "continuous_position_bias_mlp")

REPLACED = "petune_replaced"
"""Attribute of a module: by name, the values that it has without prompts, while they are replaced."""


def position_switches(block: Block, sites: Sites, slot: PromptSlot) -> list[Switch]:
    """Return switches that make the attention of a block ignore the positions of prompts.

    Args:
        block: The block that prompts enter or pass through.
        sites: Those of the whole model.
        slot: Where the prompts are in the attention.

    Returns:
        Switches that change the attention (True) or change it back (False).

    Raises:
        AttachError: The attention cuts windows itself.
    """
    switches: list[Switch] = [_hook_switch(module, PaddedOutput(slot).pad) for module in block.bias_modules]
    for module in _attention(block).modules():
        if isinstance(getattr(module, PREFIX, None), int):
            switches.append(_prefix_switch(module, slot.num_prompts))
        for name in BIAS_METHODS:
            if callable(getattr(module, name, None)):
                switches.append(_method_switch(module, name, slot))
        has_method = any(callable(getattr(module, name, None)) for name in BIAS_METHODS)
        if module not in block.bias_modules and not has_method and looks_up_table(module, slot):
            switches.append(table_switch(module, slot))
        for name in BIAS_MLPS:
            if isinstance(getattr(module, name, None), nn.Module):
                pairs = getattr(module, "relative_position_index", None)
                if pairs is not None and pairs.numel() != slot.num_tokens**2:
                    raise prompts_refused(block, sites, "cuts windows inside its attention, where they cannot enter")
                switches += _bias_mlp_switches(module, name, slot)
    return switches


@dataclass(frozen=True)
class Padding:
    """Values that make prompts neutral in a further tensor that a block is given.

    Attributes:
        row: For the prompts' rows of a table; None leaves tables alone.
        mask: `pairs` or `keys` for a tensor that says which tokens can be attended to: for each pair of tokens, or for
            each token.
        attended: In a boolean mask, the value of a token that can be attended to: False in masks of padding, and in all
            masks of torch's own attention.
    """

    row: float | None = None
    mask: Literal["pairs", "keys"] | None = None
    attended: bool = True


def paddings(block: Block, sites: Sites) -> dict[int | str, Padding]:
    """Return how the further arguments of a block are padded for prompts, by position and by keyword.

    A table of rotations must not rotate prompts: its cosines are one, its sines zero.
    """
    # such attention has the number of tokens not to rotate as an attribute
    has_prefix = any(isinstance(getattr(m, PREFIX, None), int) for m in _attention(block).modules())
    of_torch = any(isinstance(m, nn.MultiheadAttention) for m in block.enter.modules())
    called = _attention(block) if enters_attention_only(block, sites) else block.enter
    by_name: dict[int | str, Padding] = {}
    for name in inspect.signature(called.forward).parameters:
        is_padding = "padding_mask" in name
        mask: Literal["pairs", "keys"] | None = "keys" if is_padding else "pairs" if "mask" in name else None
        row = None if has_prefix else float("cos" in name)
        by_name[name] = Padding(row, mask, attended=not (is_padding or of_torch))
    by_position: dict[int | str, Padding] = dict(enumerate(by_name.values()))
    return by_position | by_name


def pad_argument(value: Any, slot: PromptSlot, padding: Padding) -> Any:
    """Pad an argument for prompts: a bias or mask of pairs, a mask of tokens, or a table with a row for each token.

    Args:
        value: The argument.
        slot: Where prompts are, and how many other tokens this call has.
        padding: From `paddings`.
    """
    if isinstance(value, tuple | list):
        return type(value)(pad_argument(item, slot, padding) for item in value)
    if not isinstance(value, Tensor) or value.ndim < 2:
        return value
    keys, rows = (value.shape[dim] == slot.num_tokens for dim in (-1, -2))
    if keys and rows and padding.mask != "keys":
        return pad_pairs(value, slot, attended=padding.attended, is_mask=padding.mask is not None)
    if padding.mask is not None:
        neutral = _neutral(value, attended=padding.attended)
        return insert(value, slot, -1 if keys else -2, neutral) if keys or rows else value
    return insert(value, slot, -2, padding.row) if rows and padding.row is not None else value


def pad_pairs(bias: Tensor, slot: PromptSlot, *, attended: bool = True, is_mask: bool = False) -> Tensor:
    """Pad a bias or mask (..., N, N) to (..., N + P, N + P): all attend to prompts, and prompts to all.

    A token that no token attends to is padding, and prompts do not attend to it either.

    Args:
        bias: The tensor.
        slot: Where the prompts are.
        attended: In a boolean mask, the value of a token that can be attended to.
        is_mask: The tensor may be a floating-point mask of zeros and ones.
    """
    neutral = _neutral(bias, attended=attended) if is_mask or not bias.is_floating_point() else 0.0
    if bias.is_floating_point():
        highest = bias.amax(-2, keepdim=True)
        hides = highest <= torch.finfo(bias.dtype).min / 2
        if isinstance(neutral, Tensor):
            hides = hides | (neutral == 1)
        row = torch.where(hides, highest, torch.zeros_like(highest))
    else:
        row = bias.amax(-2, keepdim=True) if attended else bias.amin(-2, keepdim=True)
    before, after = bias.narrow(-2, 0, slot.index), bias.narrow(-2, slot.index, bias.shape[-2] - slot.index)
    rows = row.expand(*bias.shape[:-2], slot.num_prompts, bias.shape[-1])
    return insert(torch.cat([before, rows, after], -2), slot, -1, neutral)


def _neutral(mask: Tensor, *, attended: bool) -> float | Tensor:
    """Return the value of a token that can be attended to: 0 in a mask that is added, 1 in one of zeros and ones."""
    if not mask.is_floating_point():
        return float(attended)
    is_binary = ((mask == 0) | (mask == 1)).all() & (mask == 1).any()
    return is_binary.to(mask.dtype)


def _attention(block: Block) -> nn.Module:
    return block.parts.get("attn", block).enter


def _prefix_switch(module: Any, num_prompts: int) -> Switch:
    def switch(on: bool) -> None:
        setattr(module, PREFIX, getattr(module, PREFIX) + (num_prompts if on else -num_prompts))

    return switch


def _method_switch(module: Any, name: str, slot: PromptSlot) -> Switch:
    method = PaddedMethod(module, name, slot)

    def switch(on: bool) -> None:
        if on:
            method.original = module.__dict__.get(name)
            setattr(module, name, method.get)
        elif method.original is not None:
            setattr(module, name, method.original)
        else:
            delattr(module, name)

    return switch


class PaddedMethod:
    """Stands in for a method that returns a bias."""

    def __init__(self, module: Any, name: str, slot: PromptSlot) -> None:
        self.module = module
        self.name = name
        self.slot = slot
        self.original: Callable[..., Tensor] | None = None

    def get(self, *args: Any) -> Tensor:
        """Return the bias (1 or none, H, N + P, N + P)."""
        original = self.original
        if original is None:
            original = functools.partial(getattr(type(self.module), self.name), self.module)
        return pad_pairs(original(*args), self.slot)


class PaddedOutput:
    """A hook on a module that returns a bias."""

    def __init__(self, slot: PromptSlot) -> None:
        self.slot = slot

    def pad(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """Add the prompts' rows and columns: (..., N, N) to (..., N + P, N + P)."""
        return pad_pairs(output, self.slot)


def _hook_switch(module: nn.Module, hook: Callable[..., Tensor]) -> Switch:
    handles: list[Any] = []

    def switch(on: bool) -> None:
        if on:
            handles.append(module.register_forward_hook(hook))
        else:
            handles.pop().remove()

    return switch


def _bias_mlp_switches(module: Any, name: str, slot: PromptSlot) -> list[Switch]:
    """Return the switches for Swin-V2, where a network computes the bias of the N × N pairs in a window."""
    index = getattr(module, "relative_position_index", None)
    num_heads = getattr(module, "num_heads", None) or module.num_attention_heads
    values: dict[str, Any] = {"window_size": (1, slot.num_tokens + slot.num_prompts)}
    if index is not None:  # pairs with prompts look up one more row, after the last
        table = module.relative_coords_table
        row = int(table.numel() // table.shape[-1])
        square = index.reshape(slot.num_tokens, slot.num_tokens)
        values["relative_position_index"] = insert(insert(square, slot, -2, row), slot, -1, row)
    padded = PaddedTable(slot, num_heads, indexed=index is not None)
    return [_hook_switch(getattr(module, name), padded.pad), _attribute_switch(module, values)]


class PaddedTable:
    """A hook on a bias network: adds one row of zeros for all pairs with prompts, or inserts those pairs as zeros.

    Swin-V2 applies 16 · sigmoid(row) afterwards, so zero is the middle; a zero after that would all but hide prompts.
    """

    def __init__(self, slot: PromptSlot, num_heads: int, *, indexed: bool) -> None:
        self.slot = slot
        self.num_heads = num_heads
        self.indexed = indexed

    def pad(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """Add the prompts' entries: (..., H) to (T + 1, H), or (N·N, H) to ((N + P)·(N + P), H)."""
        rows_TH = output.reshape(-1, self.num_heads)
        if self.indexed:
            return torch.cat([rows_TH, rows_TH.new_zeros(1, self.num_heads)])
        pairs_HNN = rows_TH.T.reshape(self.num_heads, self.slot.num_tokens, self.slot.num_tokens)
        return pad_pairs(pairs_HNN, self.slot).reshape(self.num_heads, -1).T


def _attribute_switch(module: Any, values: dict[str, Any]) -> Switch:
    """Replace attributes of a module, and remember the originals on it (`REPLACED`).

    What is put in follows the model to another device: only the buffer that the module has is moved with it.
    """
    originals = {name: getattr(module, name) for name in values}

    def switch(on: bool) -> None:
        if on:
            module.__dict__[REPLACED] = originals
        else:
            module.__dict__.pop(REPLACED, None)
        for name, value in (values if on else originals).items():
            is_tensor = isinstance(value, Tensor)
            setattr(module, name, value.to(getattr(module, name).device) if is_tensor else value)

    return switch
