"""Say which weights the backbone of an adapter had, and where to get them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from petune.adapters.format import SavedAdapter

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
