"""torchvision's and transformers' models of the survey: built from a config, small, with random weights."""

from __future__ import annotations

import tempfile
from typing import Any

from torch import nn

from petune.backbones.other_libraries import build_other_library

_SMALL = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
_COLUMN = {**_SMALL, "image_size": 64, "patch_size": 16}
_SWIN = {"embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "image_size": 64, "window_size": 4, "patch_size": 4}
_TINY_RATIO = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
_TINY = {**_TINY_RATIO, "intermediate_size": 64}
_TINY_TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
_STAGES = {
    "hidden_sizes": [8, 16, 24, 32],
    "num_attention_heads": [1, 2, 2, 4],
    "depths": [1, 1, 1, 1],
    "image_size": 64,
}

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
    "transformers AIMv2": ("Aimv2VisionConfig", _TINY),
    "transformers CvT": (
        "CvtConfig",
        {
            "image_size": 64,
            "embed_dim": [16, 32, 48],
            "num_heads": [1, 2, 4],
            "depth": [1, 2, 3],
            "drop_path_rate": [0.0, 0.0, 0.0],
        },
    ),
    "transformers DiNAT": ("DinatConfig", {}),
    "transformers Donut-Swin": ("DonutSwinConfig", {**_SWIN, "embed_dim": 16}),
    "transformers DPT": ("DPTConfig", _TINY),
    "transformers GLPN": ("GLPNConfig", _STAGES),
    "transformers LeViT": (
        "LevitConfig",
        {
            "image_size": 64,
            "hidden_sizes": [16, 32, 48],
            "num_attention_heads": [2, 4, 4],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
            "down_ops": [["Subsample", 8, 2, 4, 2, 2], ["Subsample", 8, 4, 4, 2, 2]],
        },
    ),
    "transformers MaskFormer-Swin": ("MaskFormerSwinConfig", {**_SWIN, "embed_dim": 16}),
    "transformers MetaCLIP 2": ("MetaClip2Config", {"vision_config": _TINY, "text_config": _TINY_TEXT}),
    "transformers MLCD": ("MLCDVisionConfig", _TINY),
    "transformers MobileViT": (
        "MobileViTConfig",
        {"image_size": 96, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 48]},
    ),
    "transformers MobileViTV2": (
        "MobileViTV2Config",
        {
            "image_size": 64,
            "n_attn_blocks": [1, 1, 1],
            "base_attn_unit_dims": [16, 24, 32],
            "width_multiplier": 0.5,
        },
    ),
    "transformers Perceiver": (
        "PerceiverConfig",
        {
            "num_latents": 8,
            "d_latents": 32,
            "d_model": 16,
            "num_self_attends_per_block": 2,
            "image_size": 32,
            "num_self_attention_heads": 4,
            "num_cross_attention_heads": 1,
        },
    ),
    "transformers Pixio": ("PixioConfig", {**_TINY_RATIO, "n_cls_tokens": 2}),
    "transformers PVT": ("PvtConfig", _STAGES),
    "transformers RADIO": ("RadioConfig", {**_TINY_RATIO, "max_img_size": 64, "patch_dim": 192}),
    "transformers Sapiens2": (
        "Sapiens2Config",
        {
            **_TINY,
            "num_key_value_heads_per_layer": [4, 2],
            "num_key_value_attention_heads": 2,
            "num_register_tokens": 2,
        },
    ),
    "transformers SegFormer": ("SegformerConfig", _STAGES),
    "transformers SwiftFormer": (
        "SwiftFormerConfig",
        {"image_size": 64, "depths": [1, 1, 2, 2], "embed_dims": [8, 16, 24, 32], "layer_scale_init_value": 0.1},
    ),
    "transformers Swin2SR": (
        "Swin2SRConfig",
        {"embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "image_size": 16, "window_size": 4},
    ),
    "transformers TIPSv2": ("Tipsv2VisionConfig", _TINY_RATIO),
    "transformers ViTDet": (
        "VitDetConfig",
        {
            **_TINY_RATIO,
            "image_size": 64,
            "pretrain_image_size": 64,
            "window_block_indices": [0],
            "window_size": 4,
            "use_relative_position_embeddings": True,
        },
    ),
    "transformers YOLOS": ("YolosConfig", {**_TINY, "image_size": [32, 32], "num_detection_tokens": 4}),
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
