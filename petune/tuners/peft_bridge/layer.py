"""Read and change a layer that PEFT made."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def peft_layers(model: nn.Module) -> dict[str, Any]:
    """Return the layers that PEFT has put into a model, by path."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {path: module for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def nested_layers(layer: Any) -> Iterator[Any]:
    """Yield a layer of PEFT's, and those of other types inside it."""
    while hasattr(layer, "base_layer"):
        yield layer
        layer = layer.base_layer


def adapters_in(layer: Any) -> set[str]:
    """Return the names of the adapters that a layer holds."""
    names = (*layer.adapter_layer_names, *layer.other_param_names)
    parts: list[Any] = [getattr(layer, name, None) for name in names]
    return {key for part in parts if hasattr(part, "keys") for key in part.keys()}  # noqa: SIM118 (not all iterate)


def active_adapters(layer: Any) -> set[str]:
    """Return the names of the adapters that take effect in a layer."""
    return set() if layer._disable_adapters else set(layer.active_adapters)


def set_active(layer: Any, names: set[str]) -> None:
    """Let these adapters of a layer take effect, and no others."""
    layer._active_adapter = sorted(names)
    layer._disable_adapters = not names


def set_adapter_active(layer: Any, name: str, on: bool) -> None:
    """Let an adapter of a layer take effect, or not; the layer's others stay as they are."""
    active = active_adapters(layer)
    set_active(layer, active | {name} if on else active - {name})


def make_constants_buffers(layer: Any) -> None:
    """Turn constants that PEFT holds as frozen parameters (AdaLoRA's ranknum) into buffers."""
    from peft.tuners._buffer_dict import BufferDict

    for name in layer.other_param_names:
        constants = getattr(layer, name, None)
        if isinstance(constants, nn.ParameterDict):
            setattr(layer, name, BufferDict({key: p.detach() for key, p in constants.items()}))


def follow_dtype(layer: Any) -> None:
    """Let a layer that notes the dtype of its weight when it is made (AdaMSS) compute in the one that it has now."""
    if isinstance(vars(layer).get("dtype"), torch.dtype) and not hasattr(layer, "petune_follows_dtype"):
        layer.petune_follows_dtype = True
        layer.register_forward_pre_hook(_note_dtype)


def _note_dtype(layer: Any, args: Any) -> None:
    weight = layer.get_base_layer().weight
    if weight.is_floating_point():
        layer.dtype = weight.dtype


def keep_state_dict_names(layer: Any) -> None:
    """Keep the wrapped module's names in state_dict, in and out, although PEFT has moved it into `base_layer`."""
    if not hasattr(layer, "petune_keeps_names"):
        layer.petune_keeps_names = True
        layer.register_state_dict_post_hook(_hide_base_layer)
        layer.register_load_state_dict_pre_hook(_insert_base_layer)


def _hide_base_layer(layer: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    inner = f"{prefix}base_layer."
    for key in [k for k in state if k.startswith(inner)]:
        state[prefix + key[len(inner) :]] = state.pop(key)


def _insert_base_layer(layer: Any, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    for name in layer.base_layer.state_dict():
        if prefix + name in state:
            state[f"{prefix}base_layer.{name}"] = state.pop(prefix + name)
