"""torchvision's and transformers' models of the survey: built from a config, small, with random weights."""

from __future__ import annotations

import tempfile
from typing import Any

from torch import nn

from petune.backbones.other_libraries import build_other_library

_SMALL = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
_COLUMN = {**_SMALL, "image_size": 64, "patch_size": 16}
_SWIN = {"embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "image_size": 64, "window_size": 4, "patch_size": 4}

TORCHVISION: dict[str, tuple[str, dict[str, Any]]] = {
    "torchvision vit": ("vit_b_32", {}),
    "torchvision swin": ("swin_t", {"image_size": 64}),
    "torchvision swin_v2": ("swin_v2_t", {"image_size": 64}),
    "torchvision maxvit": ("maxvit_t", {}),
    "torchvision resnet": ("resnet18", {}),
}
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "transformers ViT": ("ViTConfig", _COLUMN),
    "transformers DeiT": ("DeiTConfig", _COLUMN),
    "transformers BEiT": ("BeitConfig", {**_COLUMN, "use_relative_position_bias": True, "layer_scale_init_value": 0.3}),
    "transformers data2vec-vision": ("Data2VecVisionConfig", {**_COLUMN, "use_relative_position_bias": True}),
    "transformers DINOv2": ("Dinov2Config", {**_COLUMN, "image_size": 56, "patch_size": 14}),
    "transformers DINOv2, registers": ("Dinov2WithRegistersConfig", {**_COLUMN, "image_size": 56, "patch_size": 14}),
    "transformers DINOv3": ("DINOv3ViTConfig", {**_COLUMN, "num_register_tokens": 4}),
    "transformers CLIP": ("CLIPVisionConfig", _COLUMN),
    "transformers SigLIP": ("SiglipVisionConfig", _COLUMN),
    "transformers Swin": ("SwinConfig", _SWIN),
    "transformers Swinv2": ("Swinv2Config", _SWIN),
    "transformers ViT-MAE": ("ViTMAEConfig", {**_COLUMN, "mask_ratio": 0.0}),
    "transformers ViT-MSN": ("ViTMSNConfig", _COLUMN),
    "transformers Hiera": ("HieraConfig", {"embed_dim": 24, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8]}),
    "transformers PVT v2": ("PvtV2Config", {"image_size": 64, "depths": [1, 1, 1, 1]}),
    "transformers I-JEPA": ("IJepaConfig", _COLUMN),
}


def build_torchvision(family: str) -> nn.Module:
    """Return a torchvision model as `--backbone torchvision:NAME` builds it."""
    name, options = TORCHVISION[family]
    return build_other_library(f"torchvision:{name}", 3, options, pretrained=False)


def build_transformers(family: str) -> nn.Module:
    """Return a transformers model as `--backbone hf:DIR` builds it."""
    import transformers

    config, options = TRANSFORMERS[family]
    with tempfile.TemporaryDirectory() as directory:
        getattr(transformers, config)(**options).save_pretrained(directory)
        return build_other_library(f"hf:{directory}", 3, {}, pretrained=False)
