"""Say which weights the backbone of an adapter had, in which number format, and where to get them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from petune.adapters.format import SavedAdapter
from petune.base.errors import BackboneMismatch
from petune.sites.unsuitable import quantized_kind

RANDOM = "none"
"""The name of random weights."""


def describe_weights(saved: SavedAdapter) -> str:
    """Return the weights that an adapter was trained on and how to get them, as `NAME. Load those weights first`."""
    recorded = saved.config["metadata"].get("backbone")
    backbone: Mapping[str, Any] = recorded if isinstance(recorded, Mapping) else {}
    if "weights" not in backbone:
        return "weights that the file does not name. Load those that it was trained on first"
    weights = str(backbone["weights"])
    if weights != RANDOM:
        return f"{weights}. Load those weights first"
    name = str(backbone.get("name", ""))
    if ":" in name and not name.startswith(("hf:", "torchvision:")):
        return f"those that {name} builds. Load those weights first"
    if "seed" not in backbone:
        return (
            "random ones, which cannot be downloaded, and cannot be rebuilt, because their seed was not recorded. Only "
            "a copy of that model's state_dict helps"
        )
    return (
        f"random ones, which cannot be downloaded. petune.Predictor({str(saved.path)!r}).model rebuilds them from "
        f"their seed, {backbone['seed']}, with this adapter attached. Processors of another maker or generation (with "
        "AVX2 or AVX-512) draw numbers that differ in their last bits; if this one does, build the model where the "
        "adapter was trained, save its state_dict, and load that here"
    )


def backbone_dtype(model: nn.Module) -> str | None:
    """Return the name of the number format that most of a model's weights have; None if it has no weights."""
    sizes: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            sizes[parameter.dtype] += parameter.numel()
    return str(sizes.most_common(1)[0][0]).removeprefix("torch.") if sizes else None


def check_precision(model: nn.Module, saved: SavedAdapter) -> None:
    """Check that the weights of a backbone are in the number format of those that an adapter was trained on.

    Args:
        model: The backbone.
        saved: Passes where it does not record the format, as an adapter of an older petune.

    Raises:
        BackboneMismatch: They are in another one, or quantized only in one of both.
    """
    _check_quantization(model, saved)
    trained, current = saved.config.get("backbone_dtype"), backbone_dtype(model)
    if trained is not None and trained != current:
        raise BackboneMismatch(
            f"{saved.path} was trained on weights in {trained}, and this model is in {current}: it cannot be checked "
            f"that they are the same. Load the adapter while the model is in {trained}, and convert the model "
            f"afterwards, with the adapter on it: model.to(torch.{current})"
        )
    if trained is None and current not in {None, "float32"}:
        raise BackboneMismatch(
            f"{saved.path} belongs to a backbone of the same shape with other weights. This model is in {current}, and "
            "the file does not record the number format that it was trained in. If that was float32, load the adapter "
            f"while the model is in float32, and convert the model afterwards: model.to(torch.{current})"
        )


def _check_quantization(model: nn.Module, saved: SavedAdapter) -> None:
    backbone = saved.config["metadata"].get("backbone")
    if not isinstance(backbone, Mapping):
        return
    precision = str(backbone.get("base_precision", "auto"))
    quantized = quantized_kind(model)
    if (precision != "auto") == bool(quantized):
        return
    state = f"quantized ({quantized})" if quantized else "not quantized"
    raise BackboneMismatch(
        f"{saved.path} was trained with base_precision={precision}, and the weights of this model are {state}. Build "
        f"it with base_precision={precision}; petune.Predictor({str(saved.path)!r}).model is built like that, with "
        "this adapter attached"
    )
