"""Find tensors that a user trained or changed after attaching: no adapter file contains them."""

from __future__ import annotations

import warnings

from torch import nn

from petune.base.errors import AttachError
from petune.base.text import plural, shortened
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


def _named(keys: list[str], sites: Sites) -> str:
    """Return the start of a sentence that names tensors."""
    return f"{plural(len(keys), 'tensor')} of {sites.model} ({shortened(keys, 3)}) {'were' if len(keys) > 1 else 'was'}"
