"""Compute torch's own `nn.MultiheadAttention` in steps that hooks and function modes see.

torch computes all of it in one function, from weights. Here q, k and v are made by modules of their own, on which the
verbs put adapters, and are then attended to by operations that can be changed or read.

Shapes: B batch, H heads, N tokens, S keys, E width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from petune.base.errors import AttachError
from petune.injector.hooks.replaced_forward import ReplacedForward
from petune.sites.operations import MULTI_HEAD

PARAMETERS = inspect.signature(F.multi_head_attention_forward).parameters
"""Read here, because torch.compile would split the graph at it, and lose the modes around."""
NAMES = tuple(PARAMETERS)
DEFAULTS = {name: p.default for name, p in PARAMETERS.items() if p.default is not p.empty}


class Projection(nn.Module):
    """The layer that makes q, k or v, with the weights that the attention computes with now."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: tuple[Tensor, Tensor | None] | None = None

    def make(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Call this module, with its hooks; no weight stays on it."""
        self.weights = (weight, bias)
        try:
            y: Tensor = self(x)
        finally:
            self.weights = None
        return y

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, E) to (B, N, E)."""
        if self.weights is None:
            raise AttachError("q, k and v of torch's nn.MultiheadAttention can only be made by the attention itself")
        return F.linear(x, *self.weights)


class Projections(nn.Module):
    """The layers of q, k and v of one attention, and the forward that calls them while an attachment needs them.

    Attributes:
        hidden: The attention, in a tuple, so that it stays the backbone's own.
        enabled: True if the attention calls them.
        resting: True while the model is looked into without them.
        is_running: True inside the attention's forward.
        were_called: True once it has called them there.
    """

    is_petune_module = True
    NAME = "petune_projections"

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.hidden = (attention,)
        self.q, self.k, self.v = Projection(), Projection(), Projection()
        self.enabled = self.resting = self.is_running = self.were_called = False
        self.users: set[str] = set()
        self.placed: list[ReplacedForward] = []

    def use(self, name: str, on: bool) -> None:
        """Let the attention call these layers as long as one attachment needs it."""
        if on:
            self.users.add(name)
        else:
            self.users.discard(name)
        self.enabled = bool(self.users)
        attention = self.hidden[0]
        if self.enabled and not self.placed:
            attention.add_module(self.NAME, self)
            # torch.compile knows no mode that calls others: that of an adapter inside finds these layers itself
            self.placed.append(ReplacedForward(attention, self.attend, is_outermost=True))
        elif not self.enabled and self.placed:
            delattr(attention, self.NAME)
            self.placed.pop().remove()

    def attend(self, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call the attention's own forward, in steps."""
        if not self.enabled or self.resting:
            return original(*args, **kwargs)
        self.is_running, self.were_called = True, False
        try:
            with Stepwise(self.hidden[0]):  # a function mode also keeps torch from its fast path
                output = original(*args, **kwargs)
        finally:
            self.is_running = False
        if not self.were_called:
            raise AttachError(
                f"{type(self.hidden[0]).__name__} made q, k and v in a way that petune does not know. Use a method "
                "that edits whole attentions"
            )
        return output


class Stepwise(TorchFunctionMode):
    """While active, torch's own attention is computed in steps."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") != MULTI_HEAD:
            return func(*args, **(kwargs or {}))
        return in_steps(args, kwargs or {}, self.attention)


def in_steps(
    args: Any,
    kwargs: Mapping[str, Any],
    within: nn.Module,
    change: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return what `F.multi_head_attention_forward` returns for these arguments, computed in steps.

    Args:
        args: Positional arguments.
        kwargs: The others.
        within: The attention, or a module around it.
        change: Maps the arguments of `F.scaled_dot_product_attention` to others.

    Raises:
        AttachError: It has `bias_kv`, `add_zero_attn`, or no batch.
    """
    a = {**DEFAULTS, **dict(zip(NAMES, args, strict=False)), **kwargs}
    if a["query"].ndim != 3 or a["bias_k"] is not None or a["add_zero_attn"]:
        raise AttachError(
            "q, k and v of an nn.MultiheadAttention with bias_kv or add_zero_attn, or without a batch, cannot be "
            "edited. Use a method that edits whole attentions, such as houlsby"
        )
    q, k, v = (y.reshape(*y.shape[:2], a["num_heads"], -1).transpose(1, 2) for y in _projected(a, within))
    given: dict[str, Any] = {"query": q, "key": k, "value": v, "attn_mask": _mask(a, q)}
    if change is not None:
        given = change(given)
    mixed, weights = _attended(a, given["query"], given["key"], given["value"], given["attn_mask"])
    output = mixed.transpose(1, 2).flatten(2).transpose(0, 1)
    return F.linear(output, a["out_proj_weight"], a["out_proj_bias"]), weights


def _attended(
    a: Mapping[str, Any], q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the output of all heads, (B, H, N, D), and the weights if they are asked for."""
    dropout = a["dropout_p"] if a["training"] else 0.0
    if not a["need_weights"]:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout), None
    logits = (q * q.shape[-1] ** -0.5) @ k.mT
    weights = F.dropout((logits if mask is None else logits + mask).softmax(-1), dropout)
    return weights @ v, weights.mean(1) if a["average_attn_weights"] else weights


def _projected(a: Mapping[str, Any], within: nn.Module) -> list[Tensor]:
    """Return q, k and v, each (B, N, E), by the layers that adapters are on, if there are some."""
    if a["use_separate_proj_weight"]:
        weights = [a["q_proj_weight"], a["k_proj_weight"], a["v_proj_weight"]]
    else:
        weights = list(a["in_proj_weight"].chunk(3))
    biases = a["in_proj_bias"].chunk(3) if a["in_proj_bias"] is not None else (None, None, None)
    layers = next((m for m in within.modules() if isinstance(m, Projections) and m.is_running), None)
    makers: list[Callable[..., Tensor]] = [F.linear] * 3
    if layers is not None:
        layers.were_called = True
        makers = [layers.q.make, layers.k.make, layers.v.make]
    inputs = [a[name].transpose(0, 1) for name in ("query", "key", "value")]
    return [make(x, w, b) for make, x, w, b in zip(makers, inputs, weights, biases, strict=True)]


def _mask(a: Mapping[str, Any], q: Tensor) -> Tensor | None:
    """Return what is added to the logits, (B or 1, H or 1, N or 1, S), or None."""
    masks: list[Tensor] = []
    if (mask := a["attn_mask"]) is not None:
        masks.append(mask.reshape(*q.shape[:2], *mask.shape[1:]) if mask.ndim == 3 else mask[None, None])
    if (padding := a["key_padding_mask"]) is not None:
        masks.append(padding[:, None, None])
    added = [_added(mask, q.dtype) for mask in masks]
    if len(added) == 2:
        return added[0] + added[1]
    return added[0] if added else None


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask as numbers to add; True is a key that is not attended to."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -torch.inf)
