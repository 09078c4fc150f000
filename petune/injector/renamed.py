"""Saved tensors by the keys of the model at hand, where a library has renamed its modules since they were saved."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from petune.adapters.format import SavedAdapter
from petune.adapters.peft_names import with_current_names
from petune.adapters.trained_on import describe_weights
from petune.injector.addresses import file_addresses
from petune.injector.attachment import Attachment
from petune.injector.frozen import TABLE_DTYPES


def with_current_keys(attachment: Attachment, saved: SavedAdapter) -> SavedAdapter:
    """Return a saved adapter with the file's keys that its tensors would have if it were saved from this attachment.

    Names that the model has are kept. Where it lacks some, all tensors are found by their addresses; those that are
    not found keep their names, and `check_fits` refuses them. Indices and counters that are not found are those of
    another version of the library: the model keeps its own.
    """
    saved = with_current_names(attachment.model, saved)
    own = attachment.file_state()
    in_file = saved.config.get("addresses") or {}
    if saved.tensors.keys() <= own.keys() or not in_file:
        return saved
    addresses = file_addresses(attachment.tensors.addresses, attachment.state(), own)
    keys = {address: key for key, address in addresses.items()}
    renamed = {key: keys.get(in_file.get(key, ""), key) for key in saved.tensors}
    if len({*renamed.values()}) < len(renamed):
        return saved
    tensors = {renamed[key]: tensor for key, tensor in saved.tensors.items()}
    kept = {key: tensor for key, tensor in tensors.items() if key in own or not _is_table(tensor)}
    tables = {key: tensor for key, tensor in own.items() if key not in kept and _is_table(tensor)}
    return replace(saved, tensors=kept | tables)


def unfound_layers(attachment: Attachment, saved: SavedAdapter) -> str:
    """Return what a message says about tensors of a file that belong to layers which this model does not have."""
    if not saved.config.get("addresses") or saved.tensors.keys() <= attachment.file_state().keys():
        return ""
    return (
        ". If the library has renamed its modules since, this model has other weights, or the same ones in layers that "
        f"are fused or split (qkv): {describe_weights(saved)}"
    )


def _is_table(tensor: Tensor) -> bool:
    return tensor.dtype in TABLE_DTYPES
