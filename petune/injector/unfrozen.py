"""Find parameters that a user unfroze after attaching: they would train, and no adapter file would contain them."""

from __future__ import annotations

import warnings

from torch import nn

from petune.base.errors import AttachError
from petune.injector.trainable import trainable_state_of
from petune.sites.site import Sites


def refuse_unfrozen(model: nn.Module, sites: Sites) -> None:
    """Check before training that only attachments train parameters.

    Raises:
        AttachError: Other parameters require a gradient.
    """
    unfrozen = _unfrozen_by_hand(model, sites)
    if unfrozen:
        raise AttachError(
            f"{unfrozen} They would train and not be saved. Freeze them with requires_grad_(False), or attach a method "
            "that trains them, such as norm, partial or full"
        )


def warn_of_unfrozen(model: nn.Module, sites: Sites) -> None:
    """Warn before saving that parameters may have trained that are not saved."""
    unfrozen = _unfrozen_by_hand(model, sites)
    if unfrozen:
        warnings.warn(
            f"{unfrozen} The adapter does not contain them. If they have changed, it fits no other copy of the "
            "backbone. Save model.state_dict() too",
            stacklevel=3,
        )


def _unfrozen_by_hand(model: nn.Module, sites: Sites) -> str:
    """Return a sentence that names the parameters that train and are not saved; empty if there are none."""
    state = trainable_state_of(model)
    keys = state.unfrozen_by_hand() if state is not None else []
    if not keys:
        return ""
    named = ", ".join(keys[:3]) + (", …" if len(keys) > 3 else "")
    return f"{len(keys)} tensors of {sites.model} were unfrozen or put in by hand after attaching: {named}."
