"""Parameter groups for an optimizer: weight decay on matrices, none on vectors, position embedding and class token."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from petune.injector.trainable import added_to


def param_groups(
    parameters: Mapping[str, nn.Parameter], weight_decay: float, undecayed: Collection[str]
) -> list[dict[str, Any]]:
    """Return groups for any PyTorch optimizer.

    Vectors and scalars get no weight decay.

    Args:
        parameters: By state_dict key.
        weight_decay: For the others.
        undecayed: Further keys without weight decay; see `undecayed_keys`.
    """
    plain = {key for key, p in parameters.items() if key in undecayed or p.ndim <= 1}
    groups: list[dict[str, Any]] = [
        {"params": [p for key, p in parameters.items() if key not in plain], "weight_decay": weight_decay},
        {"params": [p for key, p in parameters.items() if key in plain], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def groups_by_part(
    tuned: Mapping[str, nn.Parameter],
    head: Mapping[str, nn.Parameter],
    weight_decay: float,
    undecayed: Collection[str],
    head_lr: float | None,
) -> list[dict[str, Any]]:
    """Return `param_groups` of tuned and head parameters; with `head_lr` those of the heads apart, at that rate."""
    if head_lr is None:
        return param_groups({**tuned, **head}, weight_decay, undecayed)
    heads = param_groups(head, weight_decay, undecayed)
    return [*param_groups(tuned, weight_decay, undecayed), *({**group, "lr": head_lr} for group in heads)]


def undecayed_keys(model: nn.Module) -> set[str]:
    """Return the keys of parameters that do not decay though they are no vectors.

    These are position embedding and class token, by timm's `no_weight_decay()` or by shape, (1, N, D), and vectors that
    are written as a matrix of one row or column: PEFT's IA3 has such factors, which start at 1. A layer's weight is a
    matrix whatever its shape, for instance that of a regression to one number, (1, D), or LoRA's of rank 1.
    """
    return _embedding_keys(model) | {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name, p in module.named_parameters(recurse=False)
        if p.ndim == 2 and 1 in p.shape and not isinstance(module, nn.Linear)
    }


def _embedding_keys(model: nn.Module) -> set[str]:
    no_weight_decay = getattr(model, "no_weight_decay", None)
    if callable(no_weight_decay):
        return set(no_weight_decay())
    added = added_to(model)
    return {key for key, p in model.named_parameters() if p.ndim == 3 and len(p) == 1 and id(p) not in added}
