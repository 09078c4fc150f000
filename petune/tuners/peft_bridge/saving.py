"""An attachment in PEFT's format: its config, and tensors by PEFT's keys."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

import petune
from petune.tuners.peft_bridge.layer import peft_layers
from petune.tuners.peft_bridge.wrapping import WrappedLayers

PREFIX = "base_model.model."


def to_peft(wrapped: WrappedLayers, state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return PEFT's config and tensors; the tensors share memory with the model's.

    Args:
        wrapped: The attachment's layers.
        state: All that trains, by state_dict key, the classifier included.

    Raises:
        AttachError: PEFT leaves out some of what trains.
    """
    own = {id(t) for t in wrapped.added_tensors()}
    tensors = _tensors_that_peft_saves(wrapped, own)
    saved = {t.data_ptr() for t in tensors.values()}
    left_out = [p for p in wrapped.added_parameters if p.data_ptr() not in saved]
    if left_out:
        raise petune.AttachError(
            f"PEFT does not save {len(left_out)} of the {len(wrapped.added_parameters)} tensors that {wrapped.kind} "
            "trains; nothing was written"
        )
    others = {key: t.detach() for key, t in state.items() if id(t) not in own and t.data_ptr() not in saved}
    config = _plain_config(wrapped.config)
    modules = [*dict.fromkeys(key.rpartition(".")[0] for key in others)]
    config["modules_to_save"] = modules or None
    return config, {**tensors, **{PREFIX + key: t for key, t in others.items()}}


def _plain_config(config: Any) -> dict[str, Any]:
    """Return PEFT's config as data that is the same in every process."""
    values = config.to_dict() | {"inference_mode": True}
    if not isinstance(values["target_modules"], str):
        values["target_modules"] = sorted(values["target_modules"])
    return {k: sorted(v) if isinstance(v, set) else getattr(v, "value", v) for k, v in values.items()}


def _tensors_that_peft_saves(wrapped: WrappedLayers, own: set[int]) -> dict[str, Tensor]:
    """Return what PEFT saves out of the attachment's own tensors: it chooses by names, which other types may share."""
    from peft import get_peft_model_state_dict

    shell = nn.Module()  # looks like a PeftModel, around the same tensors
    shell.base_model = wrapped.tuner
    config = copy.copy(wrapped.config)
    config.rank_pattern = None  # the layers have AdaLoRA's ranks already
    model = wrapped.model
    shell.peft_config = {**getattr(model, "peft_config", {}), wrapped.name: config}  # type: ignore[assignment]
    others = {id(t) for t in (*model.parameters(), *model.buffers())} - own  # FRoD keeps some outside of the model
    in_state = {id(t) for t in shell.state_dict(keep_vars=True).values()} - others
    named = (*shell.named_parameters(remove_duplicate=False), *shell.named_buffers(remove_duplicate=False))
    state = {key: t for key, t in named if id(t) in in_state}
    tensors = get_peft_model_state_dict(shell, state_dict=state, adapter_name=wrapped.name)
    renamed = _renamed_layers(wrapped)
    return {_original_key(renamed, key): t.detach() for key, t in tensors.items()}


def _renamed_layers(wrapped: WrappedLayers) -> dict[str, str]:
    """Return the paths of layers that another type's layer was put around, with their paths from before."""
    original = {layer: path for path, layer in wrapped.layers.items()}
    current = {path: original[layer] for path, layer in peft_layers(wrapped.model).items() if layer in original}
    return {path: before for path, before in current.items() if path != before}


def _original_key(renamed: dict[str, str], key: str) -> str:
    for path, before in renamed.items():
        if key.startswith(f"{PREFIX}{path}."):
            return f"{PREFIX}{before}{key.removeprefix(PREFIX + path)}"
    return key
