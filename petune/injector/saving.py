"""Write an attachment to an adapter directory, with the description of what it belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from petune.adapters.card import model_card
from petune.adapters.format import chosen_sites, geometry, write_adapter
from petune.adapters.migrations import FORMAT
from petune.adapters.reference_logits import reference_logits
from petune.base.arguments import PathText, check_arguments
from petune.base.config import expand_home
from petune.injector.addresses import file_addresses
from petune.injector.recorded_outputs import recorded_outputs
from petune.injector.registry import list_tuners
from petune.injector.unfrozen import warn_of_changed

if TYPE_CHECKING:
    from petune.injector.attachment import Attachment


def describe_attachment(att: Attachment) -> dict[str, Any]:
    """Return what the configuration of an adapter says about it: the method, and the backbone it belongs to."""
    origin = next((record for record in list_tuners() if record.name == att.method), None)
    return {
        "format": FORMAT,
        "tuner": att.method,
        "distribution": origin.distribution if origin else None,
        "version": origin.version if origin else None,
        "config": att.tuner.config.plain(),
        "train_head": bool(att.head),
        "geometry": geometry(att.sites),
        "chosen_sites": chosen_sites(att.sites),
        **att.tensors.describe_frozen(),
        "addresses": file_addresses(att.tensors.addresses, att.state(), att.file_state()),
    }


def save_attachment(att: Attachment, path: str | Path, metadata: Mapping[str, Any] | None) -> None:
    """Write the adapter directory; see `Attachment.save`."""
    if att.enabled:
        att.tensors.check_left_head(att.name)
    warn_of_changed(att.model, att.sites)
    check_arguments("save", path=(path, PathText), metadata=(metadata, Mapping | None))
    outputs = recorded_outputs(att.reference_logits(), att.model, att.sites, att.edit_log, att.disabled())
    config = {**att.describe(), "reference_logits": outputs, "metadata": dict(metadata or {})}
    external = att.tuner.to_external(att.state())
    card = model_card(config, att.counts, is_peft=external is not None)
    write_adapter(expand_home(path), config, att.file_state(), card, external[0] if external else None)


def attachment_logits(att: Attachment) -> dict[str, Any] | None:
    """Return the logits of a synthetic image with the attachment enabled; see `Attachment.reference_logits`."""
    if att.tensors.is_sharded or not att.tensors.are_alone():
        return None
    if att.enabled:
        return reference_logits(att.model, att.sites)
    att.enable()
    try:
        return reference_logits(att.model, att.sites)
    finally:
        att.disable()
