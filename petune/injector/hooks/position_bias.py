"""What must be told to a block's attention when tokens without a position (prompts) come in.

Attention that looks at positions learns of them by one of a few ways. `admit_prompts` finds the ways of one block and
makes each of them leave the prompts out: not rotated, with a bias of zero to and from every token. Whether that was
all is not believed but proven, by `petune.anatomy.proof`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from petune.base.errors import AttachError
from petune.sites.site import Block, Site, Sites

Switch = Callable[[bool], None]

# How attentions know positions where neither shapes nor the trace can tell, with timm's classes that do so:
PREFIX = "num_prefix_tokens"  # tokens that are not rotated (EVA, ROPE ViT, DINOv3, Qwen3)
# A bias (1 or none, H, N, N) that is read without a call (BEiT and Swin; relpos; TinyViT, LeViT, EfficientViT):
METHODS = ("_get_rel_pos_bias", "get_bias", "get_attention_biases")
# A network that makes the bias of a window (Swin-V2; Swin-V2 CR; transformers' Swin-V2):
BIAS_MLPS = ("cpb_mlp", "meta_mlp", "continuous_position_bias_mlp")


REPLACED = "petune_replaced"
"""Attribute of a module: what it has without prompts, by name, while they are there."""


@dataclass(frozen=True)
class Room:
    """Where the prompts are: `count` of them from `index` on, among `tokens` others."""

    index: int
    count: int
    tokens: int


def admit_prompts(block: Block, sites: Sites, room: Room) -> list[Switch]:
    """Prepare one block for prompts, or refuse.

    Args:
        block: The block that prompts pass through.
        sites: Those of the whole model.
        room: Where they are in the attention.

    Returns:
        Switches that tell the attention (True) or take it back (False).

    Raises:
        AttachError: The block cannot take them, with the reason.
    """
    reason = _refusal(block)
    if reason is not None:
        raise refused(block, sites, reason)
    attention = block.parts.get("attn", block).enter
    switches: list[Switch] = [_hooked(module, PaddedOutput(room).pad) for module in block.bias_modules]
    for module in attention.modules():
        if isinstance(getattr(module, PREFIX, None), int):
            switches.append(_grown_prefix(module, room.count))
        for name in METHODS:
            if callable(getattr(module, name, None)):
                switches.append(_padded_method(module, name, room))
        for name in BIAS_MLPS:
            if isinstance(getattr(module, name, None), nn.Module):
                pairs = getattr(module, "relative_position_index", None)
                if pairs is not None and pairs.numel() != room.tokens**2:
                    raise refused(block, sites, "makes windows inside of its attention, where they cannot come in")
                switches += _padded_window(module, name, room)
    return switches


def refused(
    block: Site, sites: Sites, reason: str, advice: str = "Use a method without prompts, such as adaptformer"
) -> AttachError:
    """The error that says why a block takes no prompts."""
    return AttachError(
        f"prompts are tokens that a block sees beside its patches, but {block.path} of {sites.model} {reason}. {advice}"
    )


def is_inside(block: Block) -> bool:
    """Whether prompts go into the block's attention alone, and not through the block.

    What becomes of them behind the attention is thrown away, so that a block with prompts of its own computes the
    same. It must be so where the block is no module, lays its tokens out as an image, attends in windows, or convolves
    outside of its attention.
    """
    if "attn" not in block.parts or not block.attn.is_module:
        return False
    return block.num_windows > 1 or not block.is_module or block.layout != "BNC" or bool(_spatial(block.enter))


def fills(block: Block) -> dict[int | str, float]:
    """What fills the rows of prompts in the further tensors a block is given, by position and by keyword.

    A table of rotations must not rotate them: its cosines are one, its sines zero.
    """
    attention = block.parts.get("attn", block).enter
    if any(isinstance(getattr(m, PREFIX, None), int) for m in attention.modules()):
        return {}  # such attention is told how many tokens not to rotate
    called = attention if is_inside(block) else block.enter
    names = list(inspect.signature(called.forward).parameters)
    values: dict[int | str, float] = {name: float("cos" in name) for name in names}
    by_position: dict[int | str, float] = {i: values[name] for i, name in enumerate(names)}
    return by_position | values


def padded(value: Any, room: Room, fill: float | None) -> Any:
    """An argument of a block with room for prompts: rows and columns of zeros in a bias, rows of `fill` in a table."""
    if isinstance(value, tuple | list):
        return type(value)(padded(item, room, fill) for item in value)
    if not isinstance(value, Tensor) or value.ndim < 2 or value.shape[-2] != room.tokens:
        return value
    if value.shape[-1] == room.tokens:
        return with_pairs(value, room)
    return value if fill is None else _inserted(value, room, -2, fill)


def with_pairs(bias: Tensor, room: Room) -> Tensor:
    """A bias or mask (..., N, N) as (..., N + P, N + P): prompts see all and are seen by all, without any bias."""
    neutral = 1.0 if bias.dtype == torch.bool else 0.0
    return _inserted(_inserted(bias, room, -2, neutral), room, -1, neutral)


def _inserted(x: Tensor, room: Room, dim: int, value: float) -> Tensor:
    before, after = x.narrow(dim, 0, room.index), x.narrow(dim, room.index, x.shape[dim] - room.index)
    pad = (0, room.count) if dim == -1 else (0, 0, 0, room.count)
    return torch.cat([before, F.pad(x.narrow(dim, 0, 0), pad, value=value), after], dim)


def _refusal(block: Block) -> str | None:
    inside = is_inside(block)
    if not block.is_module and not inside:
        return "is no module of its own that they could enter and leave"
    layout = block.attn.layout if inside else block.layout
    if layout == "BCHW" or (layout != "BNC" and not inside):
        return f"lays its tokens out as an image ({layout})"
    spatial = _spatial(block.attn.enter if inside else block.enter)
    if spatial:
        return f"convolves over the image ({spatial[0]})"
    return None


def _spatial(module: nn.Module) -> list[str]:
    """Names of convolutions that mix neighbours."""
    convs = [(n, m) for n, m in module.named_modules() if isinstance(m, nn.Conv1d | nn.Conv2d)]
    return [n or "its own" for n, m in convs if any(k > 1 for k in m.kernel_size)]


def _grown_prefix(module: Any, count: int) -> Switch:
    def switch(on: bool) -> None:
        setattr(module, PREFIX, getattr(module, PREFIX) + (count if on else -count))

    return switch


def _padded_method(module: Any, name: str, room: Room) -> Switch:
    method = PaddedMethod(module, name, room)

    def switch(on: bool) -> None:
        if on:
            method.before = module.__dict__.get(name)
            setattr(module, name, method.get)
        elif method.before is not None:
            setattr(module, name, method.before)
        else:
            delattr(module, name)

    return switch


class PaddedMethod:
    """Stands in for a method that returns a bias. Copies follow the module they are in."""

    def __init__(self, module: Any, name: str, room: Room) -> None:
        self.module, self.name, self.room = module, name, room
        self.before: Callable[..., Tensor] | None = None

    def get(self, *args: Any) -> Tensor:
        """The bias (1 or none, H, N + P, N + P)."""
        own = self.before
        if own is None:
            own = functools.partial(getattr(type(self.module), self.name), self.module)
        return with_pairs(own(*args), self.room)


class PaddedOutput:
    """A hook on a module that returns a bias."""

    def __init__(self, room: Room) -> None:
        self.room = room

    def pad(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """(..., N, N) to (..., N + P, N + P)."""
        return with_pairs(output, self.room)


def _hooked(module: nn.Module, hook: Callable[..., Tensor]) -> Switch:
    handles: list[Any] = []

    def switch(on: bool) -> None:
        if on:
            handles.append(module.register_forward_hook(hook))
        else:
            handles.pop().remove()

    return switch


def _padded_window(module: Any, name: str, room: Room) -> list[Switch]:
    """Swin-V2: a network makes the bias of N × N pairs in a window, whose size the attention reads from itself."""
    index = getattr(module, "relative_position_index", None)
    heads = getattr(module, "num_heads", None) or module.num_attention_heads
    table = WindowTable(room, heads, indexed=index is not None)
    size: dict[str, Any] = {"window_size": (1, room.tokens + room.count)}
    if index is not None:  # the pairs with prompts look up one more row
        size["relative_position_index"] = _inserted_index(index, room, table.rows(module))
    return [_hooked(getattr(module, name), table.pad), _replaced(module, size)]


def _inserted_index(index: Tensor, room: Room, row: int) -> Tensor:
    square = index.reshape(room.tokens, room.tokens)
    return _inserted(_inserted(square, room, -2, row), room, -1, row)


class WindowTable:
    """A hook on the network: a row more for pairs with prompts, or those pairs put in. Either is zero.

    Swin-V2 has 16 · sigmoid(row) behind it, so zero is the middle; zero behind it would all but hide the prompts.
    """

    def __init__(self, room: Room, num_heads: int, *, indexed: bool) -> None:
        self.room, self.num_heads, self.indexed = room, num_heads, indexed

    def rows(self, module: Any) -> int:
        """Rows of the table without the one more."""
        return int(module.relative_coords_table.numel() // module.relative_coords_table.shape[-1])

    def pad(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """(..., H) to (T + 1, H), or (N·N, H) to ((N + P)·(N + P), H)."""
        rows_TH = output.reshape(-1, self.num_heads)
        if self.indexed:
            return torch.cat([rows_TH, rows_TH.new_zeros(1, self.num_heads)])
        pairs_HNN = rows_TH.T.reshape(self.num_heads, self.room.tokens, self.room.tokens)
        return with_pairs(pairs_HNN, self.room).reshape(self.num_heads, -1).T


def _replaced(module: Any, values: dict[str, Any]) -> Switch:
    before = {name: getattr(module, name) for name in values}

    def switch(on: bool) -> None:
        if on:
            module.__dict__[REPLACED] = before
        else:
            module.__dict__.pop(REPLACED, None)
        for name, value in (values if on else before).items():
            setattr(module, name, value)

    return switch
