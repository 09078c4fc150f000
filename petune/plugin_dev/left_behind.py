"""Find what a detached model has that it did not have before: hooks, attributes, other classes and modes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def left_behind(model: nn.Module, base: nn.Module) -> str:
    """Return what differs in the modules of a detached model, in words; empty if nothing does.

    Args:
        model: The model.
        base: A copy of it from before, with the same modules and parameters.
    """
    for (path, module), before in zip(model.named_modules(), base.modules(), strict=True):
        problem = _of_module(module, before)
        if problem:
            return f"{path or 'the model'} {problem}"
    for (name, p), old in zip(model.named_parameters(), base.parameters(), strict=True):
        if any(len(getattr(p, kind) or ()) != len(getattr(old, kind) or ()) for kind in TENSOR_HOOKS):
            return f"{name} has a hook that was left behind"
    for (name, b), before_b in zip(model.named_buffers(), base.buffers(), strict=True):
        if not torch.equal(b, before_b):
            return f"{name} differs"
    return ""


def _of_module(module: nn.Module, before: nn.Module) -> str:
    now, old = vars(module), vars(before)
    if type(module) is not type(before):
        return f"is now a {type(module).__name__}"
    if module.training != before.training:
        return "is in another mode"
    hooks = [kind for kind in old if kind.endswith("_hooks") and len(now.get(kind) or ()) != len(old[kind] or ())]
    if hooks:
        return f"has a hook that was left behind ({hooks[0]})"
    for kind in ("_parameters", "_buffers", "_modules"):
        if list(now[kind]) != list(old[kind]):
            return f"has other {kind[1:]}: {sorted({*now[kind]} ^ {*old[kind]})}"
    if set(now) != set(old):
        name = min(set(now) ^ set(old))
        return f"{'has' if name in now else 'lacks'} the attribute {name}"
    changed = [name for name in old if _is_plain(old[name]) and now[name] != old[name]]
    if changed:
        return f"has {changed[0]} = {now[changed[0]]!r}, which was {old[changed[0]]!r}"
    return ""


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str) and not isinstance(value, Tensor)
