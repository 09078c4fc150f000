"""Hide prompts from every attention, and count the keys of attentions, which prompts change."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from petune.injector.hooks.prompt_slot import PromptSlot
from petune.sites.operations import MULTI_HEAD, PRODUCTS, SDPA, SDPA_ARGUMENTS

NUMBERING = {"arange", "linspace"}


class KeyCounts(TorchFunctionMode):
    """Counts the keys of each operation that may be an attention's, in the order of the forward.

    Attributes:
        values: Of all such operations.
        attentions: Of those that are no products: a softmax, or fused attention.
    """

    def __init__(self) -> None:
        super().__init__()
        self.values: list[int] = []
        self.attentions: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        count = num_keys_of(name, args, kwargs or {})
        if count is not None:
            self.values.append(count)
            self.attentions += [] if name in PRODUCTS else [count]
        return func(*args, **(kwargs or {}))


def num_keys_of(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    """Return the number of keys of an operation, of a product the size of what is summed; None for other operations."""
    if name in (SDPA, MULTI_HEAD):
        key: Tensor = args[1] if len(args) > 1 else kwargs["key"]
        return key.shape[-2 if name == SDPA else 0]
    values: Any = args[0] if args else None
    is_weights = isinstance(values, Tensor) and values.ndim >= 3
    if is_weights and (name == "softmax" or (name in PRODUCTS and len(args) > 1)):
        return int(values.shape[-1])
    return None


class HiddenPrompts(TorchFunctionMode):
    """While active, no token attends to the prompts: their attention logits are -inf.

    Args:
        slot: Where the prompts are.
        key_counts: Those of the same forward without prompts, in which an attention over other tokens has as many keys
            as with prompts. Without them, an attention over as many tokens as there are with prompts counts as theirs.

    Attributes:
        num_attentions: Number of attentions that had prompts to hide.
        numbers_tokens: True if something was numbered during it, as positions of tokens are.
    """

    def __init__(self, slot: PromptSlot, key_counts: Sequence[int] = ()) -> None:
        super().__init__()
        self.slot = slot
        self.key_counts = key_counts
        self._position = -1
        self.num_attentions = 0
        self.numbers_tokens = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        self.numbers_tokens |= name in NUMBERING
        self._position += num_keys_of(name, args, kwargs) is not None
        if name == SDPA:
            kwargs = self._mask_sdpa(dict(zip(SDPA_ARGUMENTS, args, strict=False)) | kwargs)
            args = ()
        elif name == MULTI_HEAD:
            kwargs = self._mask_mha(inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs).arguments)
            args = ()
        elif name == "softmax":
            args = (self._mask_logits(args[0]), *args[1:])
        elif name in PRODUCTS and len(args) > 1:
            args = (self._mask_weights(*args[:2]), *args[1:])
        return func(*args, **kwargs)

    def _mask_sdpa(self, arguments: dict[str, Any]) -> dict[str, Any]:
        query, mask = arguments["query"], arguments.get("attn_mask")
        if not self._has_prompts(arguments["key"].shape[-2]):
            return arguments
        hidden = self._mask(query)
        if arguments.get("is_causal"):  # a text tower's; a mask must then say it all
            later = torch.ones(query.shape[-2], len(hidden), dtype=torch.bool, device=query.device).triu(1)
            causal = hidden.expand(query.shape[-2], -1).masked_fill(later, -torch.inf)
            return {**arguments, "attn_mask": causal, "is_causal": False}
        if mask is None:
            return {**arguments, "attn_mask": hidden.expand(query.shape[-2], -1)}
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=hidden.dtype).masked_fill(~mask, -torch.inf)
        return {**arguments, "attn_mask": mask + hidden}

    def _mask_mha(self, arguments: dict[str, Any]) -> dict[str, Any]:
        if not self._has_prompts(arguments["key"].shape[0]):
            return arguments
        mask = self._mask(arguments["query"]).expand(arguments["query"].shape[0], -1)
        return {**arguments, "attn_mask": mask, "need_weights": True, "is_causal": False}

    def _mask_logits(self, logits: Tensor) -> Tensor:
        if logits.ndim < 3 or not self._has_prompts(logits.shape[-1]):
            return logits
        return logits + self._mask(logits)

    def _mask_weights(self, weights: Any, values: Any) -> Any:
        """Zero the weights of prompts where they are applied: heads may be mixed after the softmax (CaiT)."""
        if not isinstance(weights, Tensor) or not isinstance(values, Tensor) or weights.ndim < 3:
            return weights
        is_square = weights.shape[-1] == weights.shape[-2] == values.shape[-2]
        if not is_square or not self._has_prompts(weights.shape[-1]):
            return weights
        return weights.masked_fill(self._mask(weights) < 0, 0)

    def _has_prompts(self, num_keys: int) -> bool:
        before = self.key_counts[self._position] if self._position < len(self.key_counts) else 0
        return num_keys == self.slot.num_tokens + self.slot.num_prompts != before

    def _mask(self, like: Tensor) -> Tensor:
        """Return the additive mask (N + P): -inf for prompts. Called once for each attention that has prompts."""
        self.num_attentions += 1
        mask = torch.zeros(self.slot.num_tokens + self.slot.num_prompts, dtype=like.dtype, device=like.device)
        mask[self.slot.index : self.slot.index + self.slot.num_prompts] = -torch.inf
        return mask
