"""Compute the attention weights of every block in a forward, also of fused attention, which does not return them.

Shapes: B batch, H heads, N tokens, D width of a head.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from petune.sites.operations import MULTI_HEAD, SDPA, SDPA_ARGUMENTS
from petune.sites.site import Block


@contextlib.contextmanager
def record_attention(blocks: Sequence[Block]) -> Iterator[dict[int, Tensor]]:
    """Record the weights of each block's attention while a model runs.

    Args:
        blocks: Of the model.

    Yields:
        Block index to weights (B, N, N), float32, the mean over heads; filled by the forward. A block is missing if its
        attention is no softmax over all pairs of tokens of an image (windows, pooled keys, linear attention).
    """
    recorder = _WeightRecorder()
    handles: list[Any] = []
    for block in blocks:
        site = block.parts.get("attn", block)
        handles += recorder.watch(block.index, site.enter, site.exit)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one fused operation for a whole layer
    try:
        with recorder:
            yield recorder.weights
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for handle in handles:
            handle.remove()


class _WeightRecorder(TorchFunctionMode):
    """Computes the weights of attentions that run inside a watched module."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: dict[int, Tensor] = {}
        self.num_images = 0
        self.block: int | None = None

    def watch(self, index: int, enter: nn.Module, leave: nn.Module) -> list[Any]:
        """Take what runs from the entry of one module to the exit of another as block `index`."""

        def start(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.block = index

        def stop(module: nn.Module, args: Any, output: Any) -> None:
            self.block = None

        return [
            enter.register_forward_pre_hook(start, with_kwargs=True),
            leave.register_forward_hook(stop, always_call=True),
        ]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self.block is None or self.block in self.weights:
            return func(*args, **kwargs)
        if name == MULTI_HEAD:
            return self._multi_head(func, args, kwargs)
        if name == SDPA:
            self._add(_weights_of(**dict(zip(SDPA_ARGUMENTS, args, strict=False)) | kwargs))
        result = func(*args, **kwargs)
        if name == "softmax" and isinstance(result, Tensor):
            self._add(result)
        return result

    def _multi_head(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        wanted = kwargs.get("need_weights", True)
        output, weights = func(*args, **{**kwargs, "need_weights": True, "average_attn_weights": False})
        self._add(weights)
        return output, weights.mean(1) if wanted else None

    def _add(self, weights_BHNN: Tensor | None) -> None:
        if self.block is None or weights_BHNN is None or weights_BHNN.ndim != 4:
            return
        if weights_BHNN.shape[-1] == weights_BHNN.shape[-2] > 1:
            self.weights[self.block] = weights_BHNN.detach().float().mean(1)


def _weights_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """Return the weights of `torch.nn.functional.scaled_dot_product_attention`, (B, H, N, N)."""
    if is_causal or enable_gqa or query.ndim != 4 or query.is_nested:
        return None
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    logits_BHNN = query.float() @ key.float().transpose(-2, -1) * scale
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        logits_BHNN = logits_BHNN.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        logits_BHNN = logits_BHNN + attn_mask
    return logits_BHNN.softmax(-1)
