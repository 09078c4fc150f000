"""Outputs of a model, as they are written into an adapter's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from petune.adapters.reference_logits import backbone_features
from petune.base.errors import AttachError
from petune.injector.edit_log import EditLog
from petune.sites.site import Sites

MAX_UNFROZEN = 0.1
"""Largest part of a model that is copied to disable an attachment for one forward."""


def recorded_outputs(
    logits: Mapping[str, Any] | None,
    model: nn.Module,
    sites: Sites,
    log: EditLog,
    disabled: AbstractContextManager[None],
) -> dict[str, Any] | None:
    """Return reference logits for a configuration, together with the features of the backbone alone.

    Args:
        logits: With the attachment; None if they are not known, and then nothing else is computed.
        model: The model.
        sites: Its sites.
        log: What the attachment's tuner has changed.
        disabled: Disables the attachment inside the context.
    """
    if logits is None:
        return None
    num_unfrozen = sum(p.numel() for p in log.unfrozen)
    if num_unfrozen > MAX_UNFROZEN * sum(p.numel() for p in model.parameters()):
        return dict(logits)
    try:
        with disabled:
            return {**logits, "backbone_features": backbone_features(model, sites)}
    except AttachError:  # the original values were not kept
        return dict(logits)
