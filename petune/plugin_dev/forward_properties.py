"""The properties of adapters that run a part of the model themselves, or have a loss of their own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from petune.injector.hooks.around import Around
from petune.injector.hooks.base import Holder
from petune.plugin_dev.trial import Trial


def inner_gradients(t: Trial) -> str:
    """Return the problem with an adapter that calls `inner` under no_grad only."""
    if not any(isinstance(module, Around) for module in t.model.modules()):
        return ""
    model = copy.deepcopy(t.model).train()
    calls = {holder: _watch(holder) for holder in model.modules() if isinstance(holder, Around)}
    t.x.call(model)
    cut = next((holder for holder, with_grad in calls.items() if with_grad and not any(with_grad)), None)
    if cut is None:
        return ""
    return f"{type(cut.adapter).__name__} calls inner only under torch.no_grad(). Call it once with gradients"


def _watch(holder: Around) -> list[bool]:
    """Return a list that fills with whether gradients were enabled in each call of `inner`."""
    with_grad: list[bool] = []

    def enter(adapter: nn.Module, args: tuple[Callable[[Tensor], Tensor], Tensor]) -> Any:
        inner, x = args

        def watched(x: Tensor) -> Tensor:
            with_grad.append(torch.is_grad_enabled())
            return inner(x)

        return watched, x

    holder.adapter.register_forward_pre_hook(enter)
    return with_grad


def auxiliary_loss(t: Trial) -> str:
    """Return the problem with the losses of the tuner and of its adapters, which adapters set in their forward."""
    return _constant_loss(t) or _adapters_loss(t)


def _constant_loss(t: Trial) -> str:
    terms = t.training.terms
    if not terms or any(isinstance(term, Tensor) and term.requires_grad for term in terms):
        return ""
    return "loss(step) never has a gradient, so it trains nothing. Compute it from what trains, or return None"


def _adapters_loss(t: Trial) -> str:
    names = {type(h.adapter).__name__ for h, _ in t.att.edit_log.placed if hasattr(h.adapter, "aux_loss")}
    if not names:
        return ""
    model = copy.deepcopy(t.model).train()
    t.x.call(model)
    values = [loss for holder in model.modules() if isinstance(holder, Holder) for loss in holder.aux_losses]
    if not values:
        return f"{', '.join(sorted(names))} sets no aux_loss in train mode"
    loss = t.att.tuner.aux_loss(values)
    if not isinstance(loss, Tensor) or loss.ndim or not loss.isfinite():
        return f"the tuner's aux_loss() returned {loss}. Return a finite scalar"
    return "" if loss.requires_grad else "aux_loss has no gradient. Compute it from what trains, without detach"
