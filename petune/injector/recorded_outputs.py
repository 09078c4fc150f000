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
    reference_logits: Mapping[str, Any] | None,
    model: nn.Module,
    sites: Sites,
    log: EditLog,
    disabled: AbstractContextManager[None],
) -> dict[str, Any]:
    """Return the entries of a configuration that say what a model computes.

    Args:
        reference_logits: With the attachment; None if they are not known, and then nothing else is computed.
        model: The model.
        sites: Its sites.
        log: What the attachment's tuner has changed.
        disabled: Disables the attachment inside the context.
    """
    outputs: dict[str, Any] = {"reference_logits": reference_logits, "backbone_features": None}
    num_unfrozen = sum(p.numel() for p in log.unfrozen)
    if reference_logits is None or num_unfrozen > MAX_UNFROZEN * sum(p.numel() for p in model.parameters()):
        return outputs
    try:
        with disabled:
            outputs["backbone_features"] = backbone_features(model, sites)
    except AttachError:  # the original values were not kept
        pass
    return outputs
