"""Hide prompts from every attention: what is left must then be what it was without them.

A mode over torch's functions, independent of petune: wherever attention scores have columns for prompts, those are
set to -inf. If the model then computes what it did before, no position, mask or window was falsified.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class HiddenPrompts(TorchFunctionMode):
    """While active, no token sees the `num_prompts` keys from `index` on, in attentions of `sizes` keys.

    Attributes:
        count: How many attentions had prompts to hide.
    """

    def __init__(self, num_prompts: int, index: int, sizes: set[int]) -> None:
        super().__init__()
        self.num_prompts, self.index, self.sizes, self.count = num_prompts, index, sizes, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            given = inspect.signature(_sdpa).bind(*args, **kwargs).arguments
            if given["key"].shape[-2] in self.sizes:
                return func(**{**given, "attn_mask": self._mask(given)})
        if name == "multi_head_attention_forward":
            given = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs).arguments
            if given["key"].shape[0] in self.sizes:
                hidden = self._columns(given["query"], given["key"].shape[0])
                mask = hidden.expand(given["query"].shape[0], -1)
                return func(**{**given, "attn_mask": mask, "need_weights": True, "is_causal": False})
        if name == "softmax" and args[0].ndim >= 3 and args[0].shape[-1] in self.sizes:
            args = (args[0] + self._columns(args[0], args[0].shape[-1]), *args[1:])
        return func(*args, **kwargs)

    def _mask(self, given: dict[str, Any]) -> Tensor:
        hidden = self._columns(given["query"], given["key"].shape[-2])
        mask = given.get("attn_mask")
        if mask is None:
            return hidden.expand(given["query"].shape[-2], -1)
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=hidden.dtype).masked_fill(~mask, -torch.inf)
        return mask + hidden

    def _columns(self, like: Tensor, size: int) -> Tensor:
        self.count += 1
        columns = torch.zeros(size, dtype=like.dtype, device=like.device)
        columns[self.index : self.index + self.num_prompts] = -torch.inf
        return columns


def _sdpa(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: Any = 0.0, is_causal: Any = False, **more: Any
) -> None:
    """The signature of torch's, which is built in and has none."""
