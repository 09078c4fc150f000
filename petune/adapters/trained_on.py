"""Say which weights the backbone of an adapter had, in which number format, and where to get them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
        f"their seed, {backbone['seed']}, with this adapter attached"
    )


def check_precision(model: nn.Module, saved: SavedAdapter) -> None:
    """Check that the weights of a backbone are quantized if and only if those that an adapter was trained on were.

    Args:
        model: The backbone.
        saved: Passes if it does not record the backbone, as one that was trained without a run.

    Raises:
        BackboneMismatch: They are not.
    """
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
