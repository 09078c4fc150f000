"""Describe an attachment and write it to an adapter directory."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from petune.adapters.card import model_card
from petune.adapters.format import chosen_sites, geometry, write_adapter
from petune.adapters.migrations import FORMAT
from petune.adapters.reference_logits import backbone_features
from petune.base.config import expand_home
from petune.base.errors import AttachError
from petune.injector.adapter_tensors import AdapterTensors
from petune.injector.addresses import file_addresses
from petune.injector.counts import Counts
from petune.injector.edit_log import EditLog
from petune.injector.registry import list_tuners
from petune.injector.tuner import Tuner
from petune.sites.sites import Sites

MAX_UNFROZEN = 0.1
"""Largest part of a model that is copied to disable an attachment for one forward."""


def describe(
    method: str,
    tuner: Tuner[Any],
    sites: Sites,
    tensors: AdapterTensors,
    state: Mapping[str, Tensor],
    file_state: Mapping[str, Tensor],
) -> dict[str, Any]:
    """Return what the configuration of an adapter says about it; see `Attachment.describe`."""
    origin = next((record for record in list_tuners() if record.name == method), None)
    return {
        "format": FORMAT,
        "tuner": method,
        "distribution": origin.distribution if origin else None,
        "version": origin.version if origin else None,
        "config": tuner.config.plain(),
        "train_head": bool(tensors.head),
        "geometry": geometry(sites),
        "chosen_sites": chosen_sites(sites),
        **tensors.describe_frozen(),
        "addresses": file_addresses(tensors.addresses, state, file_state),
    }


def write(
    path: str | Path,
    config: dict[str, Any],
    counts: Counts,
    tensors: dict[str, Tensor],
    external: tuple[dict[str, Any], dict[str, Tensor]] | None,
) -> None:
    """Write the adapter directory; see `Attachment.save`.

    Args:
        path: The directory.
        config: What `adapter_config.json` says.
        counts: For the model card.
        tensors: By the file's keys.
        external: What `Tuner.to_external` returned.
    """
    card = model_card(config, counts, is_peft=external is not None)
    write_adapter(expand_home(path), config, tensors, card, external[0] if external else None)


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
