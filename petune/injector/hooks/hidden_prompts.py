"""Prove that prompts falsify nothing: hidden from every attention, they must leave a block as it was without them."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from petune.injector.hooks.position_bias import Room
from petune.sites.recorder import PRODUCTS


class HiddenPrompts(TorchFunctionMode):
    """While active, no token sees the prompts: their columns of attention logits are -inf.

    Attributes:
        count: How many attentions had prompts to hide.
    """

    def __init__(self, room: Room) -> None:
        super().__init__()
        self.room, self.count = room, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            given = inspect.signature(_sdpa).bind(*args, **kwargs).arguments
            given |= given.pop("more", {})
            if self._has_prompts(given["key"].shape[-2]):
                return func(**{**given, "attn_mask": self._mask(given)})
        elif name == "multi_head_attention_forward":
            given = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs).arguments
            if self._has_prompts(given["key"].shape[0]):
                mask = self._columns(given["query"]).expand(given["query"].shape[0], -1)
                return func(**{**given, "attn_mask": mask, "need_weights": True, "is_causal": False})
        elif name == "softmax" and args[0].ndim >= 3 and self._has_prompts(args[0].shape[-1]):
            args = (args[0] + self._columns(args[0]), *args[1:])
        elif name in PRODUCTS and self._weighs(*args[:2]):  # heads may have been mixed behind the softmax (CaiT)
            args = (args[0].masked_fill(self._columns(args[0]) < 0, 0), *args[1:])
        return func(*args, **kwargs)

    def _weighs(self, weights: Any, values: Any = None) -> bool:
        if not isinstance(weights, Tensor) or not isinstance(values, Tensor) or weights.ndim < 3:
            return False
        return self._has_prompts(weights.shape[-1]) and weights.shape[-1] == weights.shape[-2] == values.shape[-2]

    def _has_prompts(self, keys: int) -> bool:
        return keys == self.room.tokens + self.room.count

    def _mask(self, given: dict[str, Any]) -> Tensor:
        hidden, mask = self._columns(given["query"]), given.get("attn_mask")
        if mask is None:
            return hidden.expand(given["query"].shape[-2], -1)
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=hidden.dtype).masked_fill(~mask, -torch.inf)
        both: Tensor = mask + hidden
        return both

    def _columns(self, like: Tensor) -> Tensor:
        self.count += 1
        columns = torch.zeros(self.room.tokens + self.room.count, dtype=like.dtype, device=like.device)
        columns[self.room.index : self.room.index + self.room.count] = -torch.inf
        return columns


def _sdpa(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: Any = 0.0, is_causal: Any = False, **more: Any
) -> None:
    """The signature of torch's own, which is built in and has none to bind to."""


def same(x: Tensor, y: Tensor) -> bool:
    """Whether two outputs agree up to the rounding of their type; in shape on the meta device, which has no numbers."""
    if x.is_meta:
        return x.shape == y.shape
    scale = float(x.abs().max().clamp(min=1e-6))
    tolerance = 1e-4 if x.dtype in (torch.float32, torch.float64) else 5e-2
    return x.shape == y.shape and float((x - y).abs().max()) <= tolerance * scale
