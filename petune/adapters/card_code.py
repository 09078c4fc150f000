"""The lines of a model card that build the backbone, as its own library does."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from petune.adapters.card_task import num_outputs


def model_code(config: Mapping[str, Any], metadata: Mapping[str, Any]) -> str:
    """Return Python code that builds an adapter's backbone as `model`; empty if no library's own call builds it.

    Args:
        config: petune's part of `adapter_config.json`.
        metadata: Its metadata, as published.
    """
    backbone, outputs = metadata.get("backbone"), num_outputs(metadata)
    if not isinstance(backbone, Mapping) or outputs is None:
        return ""
    is_plain = (backbone.get("weights_option"), backbone.get("head")) == ("default", "linear")
    if not is_plain or not isinstance(backbone.get("name"), str) or backbone.get("weights") == "none":
        return ""
    model_class = str((config.get("geometry") or {}).get("model"))
    if backbone["name"].startswith("hf:"):
        return _transformers_code(model_class, backbone, outputs) or _timm_code(backbone, outputs)
    return _timm_code(backbone, outputs)


def _transformers_code(model_class: str, backbone: Mapping[str, Any], num_classes: int) -> str:
    """Return the call of `from_pretrained`, which does not resample position embeddings for another image size."""
    options = backbone.get("options") or {}
    is_resized = backbone.get("image_size") is not None or backbone.get("patch_size") is not None
    if "ForImageClassification" not in model_class or is_resized or not isinstance(options, Mapping):
        return ""
    name = backbone["name"].removeprefix("hf:")
    more = f", **{dict(options)!r}" if options else ""
    return (
        f"from transformers import {model_class}\n\n"
        f"model = {model_class}.from_pretrained(\n"
        f"    {name!r}, num_labels={num_classes}, ignore_mismatched_sizes=True{more}\n)"
    )


def _timm_code(backbone: Mapping[str, Any], num_classes: int) -> str:
    """Return the call of `timm.create_model`, for weights of a hub and options that are numbers."""
    name, *options = str(backbone.get("full_name")).split(",")
    if not backbone.get("hub_id") or not all(re.fullmatch(r"[a-z_]+=\d+", option) for option in options):
        return ""
    name = re.sub("^hf:", "hf-hub:", name)
    options = [re.sub("^image_size=", "img_size=", option) for option in options]
    arguments = ", ".join([repr(name), "pretrained=True", f"num_classes={num_classes}", *options])
    return f"import timm\n\nmodel = timm.create_model({arguments})"
