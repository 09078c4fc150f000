"""Detectors, segmenters and other models with several heads, tiny and with random weights."""

from __future__ import annotations

from typing import Any

import transformers
from torch import nn

VIT = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
DETR = {
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "num_queries": 5,
}
STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16], "decoder_hidden_size": 16}


def column(**options: Any) -> dict[str, Any]:
    return {**VIT, "num_hidden_layers": 2, "image_size": 32, "patch_size": 8, "num_labels": 3, **options}


def swin() -> Any:
    stages = ["stage1", "stage2", "stage3", "stage4"]
    return transformers.SwinConfig(
        image_size=64, embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=4, out_features=stages
    )


def yolos() -> nn.Module:
    config = transformers.YolosConfig(**column(image_size=[32, 32], num_detection_tokens=5))
    return transformers.YolosForObjectDetection(config)


def segformer() -> nn.Module:
    config = transformers.SegformerConfig(image_size=64, **STAGES, num_attention_heads=[1, 1, 2, 2], num_labels=3)
    return transformers.SegformerForSemanticSegmentation(config)


def eomt() -> nn.Module:
    config = transformers.EomtConfig(**column(num_hidden_layers=3, num_blocks=1, num_queries=5, num_upscale_blocks=1))
    return transformers.EomtForUniversalSegmentation(config)


def mask_former() -> nn.Module:
    config = transformers.MaskFormerConfig(
        backbone_config=swin(),
        decoder_config=transformers.DetrConfig(d_model=32, **DETR),
        fpn_feature_size=32,
        mask_feature_size=32,
        num_labels=3,
    )
    return transformers.MaskFormerForInstanceSegmentation(config)


def mask2former() -> nn.Module:
    sizes = dict.fromkeys(("feature_size", "mask_feature_size", "hidden_dim"), 32)
    config = transformers.Mask2FormerConfig(
        backbone_config=swin(),
        **sizes,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        num_queries=5,
        num_labels=3,
    )
    return transformers.Mask2FormerForUniversalSegmentation(config)


def detr() -> nn.Module:
    resnet = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1] * 4, layer_type="basic", out_features=["stage4"]
    )
    config = transformers.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=resnet,
        d_model=16,
        num_labels=3,
        **DETR,
    )
    return transformers.DetrForObjectDetection(config)


def upernet() -> nn.Module:
    config = transformers.UperNetConfig(
        backbone_config=swin(), hidden_size=16, auxiliary_in_channels=32, num_labels=3, pool_scales=[1, 2]
    )
    return transformers.UperNetForSemanticSegmentation(config)


def mobilevit() -> nn.Module:
    """Its encoder calls convolutions after its last block; they are backbone."""
    config = transformers.MobileViTConfig(
        image_size=64, num_labels=3, hidden_sizes=[16, 16, 16], neck_hidden_sizes=[8, 8, 8, 8, 8, 8, 32],
        aspp_out_channels=8, atrous_rates=[1, 2, 3],
    )  # fmt: skip
    return transformers.MobileViTForSemanticSegmentation(config)


def swin2sr(upsampler: str, resi_connection: str = "1conv") -> Any:
    return transformers.Swin2SRConfig(
        image_size=32, patch_size=1, embed_dim=24, depths=[1, 1], num_heads=[2, 2], window_size=8,
        upscale=4 if upsampler == "nearest+conv" else 2, upsampler=upsampler, resi_connection=resi_connection,
    )  # fmt: skip


def super_resolution(upsampler: str, resi_connection: str = "1conv") -> nn.Module:
    return transformers.Swin2SRForImageSuperResolution(swin2sr(upsampler, resi_connection))


def distilled() -> nn.Module:
    return transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**column()))


def vit() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**column()))
