"""Adapters of transformers' models from development versions, which put a module of petune's around the model.

That module is gone: `model.vit.layers.0…` in such a file is `vit.layers.0…` now. The linear classifier that petune
added was called `head`; now it is the model's `classifier`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

INNER = "model."
HEADS = {"Logits": f"{INNER}classifier.", "PooledClassifier": "head."}
"""The wrapper classes, by name, and the path of the classifier in each."""
HEAD = "classifier."


def unwrap(config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return an adapter's configuration and tensors with the keys of transformers' own model.

    Args:
        config: In the current format.
        tensors: By the file's keys.

    Returns:
        The same ones if there was no wrapper. Otherwise the configuration has an entry `wrapper`, and the model in its
        geometry is None, since the file does not name it.
    """
    wrapper = wrapper_of(config)
    if wrapper is None:
        return config, tensors
    unwrapped = {**config, "wrapper": wrapper, "geometry": {**config["geometry"], "model": None}}
    return unwrapped, {_inner_key(key, wrapper): tensor for key, tensor in tensors.items()}


def wrapper_of(config: Mapping[str, Any]) -> str | None:
    """Return the class of the wrapper that an adapter's backbone had; None without one."""
    backbone = config["metadata"].get("backbone")
    name = backbone.get("name") if isinstance(backbone, Mapping) else None
    model = (config["geometry"] or {}).get("model")
    return model if model in HEADS and str(name).startswith("hf:") else None


def wrapped_key(key: str, wrapper: str | None) -> str:
    """Return the key that a tensor of transformers' model had in its wrapper, by which its fingerprint was computed."""
    if wrapper is None:
        return key
    return HEADS[wrapper] + key.removeprefix(HEAD) if key.startswith(HEAD) else INNER + key


def _inner_key(key: str, wrapper: str) -> str:
    """Undo `wrapped_key`; PEFT's files have a prefix of their own in front."""
    start = "base_model.model." if key.startswith("base_model.model.") else ""
    rest = key.removeprefix(start)
    if rest.startswith(HEADS[wrapper]):
        return start + HEAD + rest.removeprefix(HEADS[wrapper])
    return start + rest.removeprefix(INNER)
