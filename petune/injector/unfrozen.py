"""Find tensors that a user froze before attaching, or trained or changed after it, which no adapter file contains."""

from __future__ import annotations

import warnings
from collections.abc import Container

from torch import nn

from petune.base.errors import AttachError
from petune.base.text import plural, shortened
from petune.injector.keys import named_parameters
from petune.injector.trainable import trainable_state_of
from petune.sites.sites import Sites


def refuse_unfrozen(model: nn.Module, sites: Sites) -> None:
    """Check before training that only attachments train parameters.

    Raises:
        AttachError: Other parameters require a gradient.
    """
    state = trainable_state_of(model)
    keys = state.unfrozen_by_hand() if state is not None else []
    if keys:
        raise AttachError(
            f"{_named(keys, sites)} unfrozen or put in by hand after attaching. They would train and not be "
            "saved. Freeze them with requires_grad_(False), or attach a method that trains them, such as norm, partial "
            "or full"
        )


def warn_of_changed(model: nn.Module, sites: Sites) -> None:
    """Warn before saving that tensors that are not saved have changed, or may have: they require a gradient."""
    state = trainable_state_of(model)
    if state is None:
        return
    keys = dict.fromkeys((*state.unfrozen_by_hand(), *state.changed_by_hand()))
    if keys:
        warnings.warn(
            f"{_named(list(keys), sites)} unfrozen, changed or put in by hand after attaching. The adapter "
            "does not contain them: it fits only a backbone with the same values. Save model.state_dict() too",
            stacklevel=3,
        )


def warn_of_trained_though_frozen(model: nn.Module, sites: Sites, name: str, trained: Container[int]) -> None:
    """Warn of what a method trains although it had requires_grad=False, unless the whole backbone had.

    Args:
        model: The model.
        sites: Its sites.
        name: The attachment.
        trained: Identities of the parameters that it trains.
    """
    state = trainable_state_of(model)
    flags = state.flags_before if state is not None else {}
    head = {id(p) for m in sites.head_modules() for p in m.parameters()}
    before = {key: p for key, p in named_parameters(model).items() if id(p) in flags and p.is_floating_point()}
    if not any(flags[id(p)] for p in before.values() if id(p) not in head):
        return  # the usual preparation, which says nothing about single parameters
    keys = [key for key, p in before.items() if id(p) in trained and not flags[id(p)]]
    if keys:
        in_head = all(id(before[key]) in head for key in keys)
        way = "attach with train_head=False" if in_head else "use a method, or its option blocks, that leaves them out"
        warnings.warn(
            f"{name} trains {plural(len(keys), 'parameter')} of {sites.model} ({shortened(keys, 3)}) that had "
            f"requires_grad=False before, among others of the backbone that had not. To keep them frozen, {way}",
            stacklevel=6,
        )


def _named(keys: list[str], sites: Sites) -> str:
    """Return the start of a sentence that names tensors."""
    return f"{plural(len(keys), 'tensor')} of {sites.model} ({shortened(keys, 3)}) {'were' if len(keys) > 1 else 'was'}"
