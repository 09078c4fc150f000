"""Models of transformers built by their class: towers, whole models, videos, and what takes other inputs than images.

Sizes are tiny, the structure is that of the real configs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Example = Callable[[], Any]


@dataclass(frozen=True)
class ByClass:
    """A recipe for building a model.

    Attributes:
        model: A class of transformers, or `module.Class` below `transformers.models`.
        config: The class of its config, by the same rule.
        options: Arguments of the config; a pair of config class and arguments is a nested config.
        example: Returns an example of what the model takes; None for one image or clip of the size in the config.
    """

    model: str
    config: str
    options: dict[str, Any]
    example: Example | None = None


def build_by_class(entry: ByClass) -> nn.Module:
    """Return the model with random weights."""
    config = find_class(entry.config)(**{key: _nested(value) for key, value in entry.options.items()})
    model: nn.Module = find_class(entry.model)(config)
    return model


def _nested(value: Any) -> Any:
    return find_class(value[0])(**value[1]) if isinstance(value, tuple) and isinstance(value[0], str) else value


def find_class(name: str) -> Any:
    """Return a class of transformers, by its name or by `module.Class` below `transformers.models`."""
    import importlib

    import transformers

    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(f"transformers.models.{module}") if module else transformers, attribute)


def image(size: int = 32) -> torch.Tensor:
    return torch.zeros(2, 3, size, size)


def ids() -> torch.Tensor:
    """Return five tokens: with ten prompts not as many as an image has, or hiding prompts would hide patches, too."""
    return torch.tensor([[1, 5, 7, 9, 2], [1, 8, 3, 2, 0]])


def image_and_text(size: int = 32) -> Example:
    return lambda: {"input_ids": ids(), "pixel_values": image(size)}


def _image_and_masked_text() -> dict[str, Any]:
    return {"input_ids": ids(), "pixel_values": image(), "attention_mask": (ids() > 0).long()}


def _chat(num_image_tokens: int) -> Example:
    ids = [[1, *[59] * num_image_tokens, 5, 7]] * 2
    return lambda: {"input_ids": torch.tensor(ids), "pixel_values": image()}


def _naflex() -> dict[str, Any]:
    """Return two images of 4 x 4 and 3 x 4 patches."""
    mask = torch.tensor([[1] * 16, [1] * 12 + [0] * 4])
    sizes = torch.tensor([[4, 4], [3, 4]])
    return {"pixel_values": torch.randn(2, 16, 192), "pixel_attention_mask": mask, "spatial_shapes": sizes}


def packed() -> dict[str, Any]:
    """Return the 4 x 4 patches of one image, as rows."""
    return {"hidden_states": torch.randn(16, 3 * 2 * 4 * 4), "grid_thw": torch.tensor([[1, 4, 4]])}


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
VIT = {**SMALL, "intermediate_size": 64, "image_size": 32, "patch_size": 8}
RATIO = {**SMALL, "image_size": 32, "patch_size": 8}  # configs with mlp_ratio
TEXT = {**SMALL, "intermediate_size": 64, "vocab_size": 60, "max_position_embeddings": 16}
CLIP_TEXT = {**TEXT, "eos_token_id": 2}
_SIGLIP_TEXT = {**TEXT, "projection_size": 32}
_BLIP_TEXT = {**TEXT, "encoder_hidden_size": 32}
_NAFLEX = {**SMALL, "intermediate_size": 64, "patch_size": 8, "num_patches": 16}
_STAGES = {"hidden_sizes": [8, 16, 24, 32], "num_attention_heads": [1, 2, 2, 4], "depths": [1, 1, 1, 1]}
SWIN = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "image_size": 64, "window_size": 4, "patch_size": 4}
_DPT = {
    **VIT,
    "num_hidden_layers": 4,
    "backbone_out_indices": [0, 1, 2, 3],
    "neck_hidden_sizes": [8, 8, 16, 16],
    "fusion_hidden_size": 8,
    "num_labels": 3,
    "initializer_range": 0.15,  # with 0.02 its small convolutions forget the image
}
_VITDET = {**RATIO, "image_size": 64, "pretrain_image_size": 64, "window_block_indices": [0], "window_size": 4}
_POSE = {**RATIO, "image_size": [32, 24], "patch_size": [8, 8]}
_SAPIENS = {"num_key_value_heads_per_layer": [4, 2], "num_key_value_attention_heads": 2, "num_register_tokens": 2}
_SAPIENS_HEAD = {"upsample_out_channels": [16, 16], "conv_out_channels": [16]}
_LLM = {**TEXT, "num_key_value_heads": 4, "pad_token_id": 0}
_VIDEO = {**VIT, "num_labels": 3}
_VJEPA = {"hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 2, "crop_size": 32, "patch_size": 8}
_PREDICTOR = {"pred_hidden_size": 36, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1}
_PRISM = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 36, "num_frames": 2}
_PRISM_LAYERS = {"num_spatial_layers": 2, "num_temporal_layers": 1, "num_auxiliary_layers": 1}
_EFFICIENTNET = {"image_size": 64, "hidden_dim": 32, "depth_coefficient": 0.1, "width_coefficient": 0.1}
_PERCEIVER = {"num_latents": 8, "d_latents": 32, "num_self_attends_per_block": 2, "num_labels": 3}
_PERCEIVER_HEADS = {"num_self_attention_heads": 4, "num_cross_attention_heads": 1}
_GPT = {"vocab_size": 17, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4, "num_labels": 3}
QWEN = {"depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 4}
SAM = {
    **SMALL,
    "image_size": 64,
    "patch_size": 8,
    "mlp_dim": 64,
    "output_channels": 16,
    "window_size": 3,
    "global_attn_indexes": [1],
}


def two(vision: dict[str, Any], text: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"vision_config": vision, "text_config": text, **more}


CLASSES: dict[str, ByClass] = {
    "AIMv2, image and text": ByClass(
        "Aimv2Model", "Aimv2Config", two(VIT, CLIP_TEXT, projection_dim=16), image_and_text()
    ),
    "ALIGN, image and text": ByClass(
        "AlignModel", "AlignConfig", two(_EFFICIENTNET, TEXT, projection_dim=32), image_and_text(64)
    ),
    "ALIGN, tower": ByClass("AlignVisionModel", "AlignVisionConfig", _EFFICIENTNET),
    "BLIP, image and text": ByClass(
        "BlipModel", "BlipConfig", two(VIT, _BLIP_TEXT, projection_dim=16), image_and_text()
    ),
    "BLIP, retrieval": ByClass(
        "BlipForImageTextRetrieval",
        "BlipConfig",
        two(VIT, _BLIP_TEXT, projection_dim=16, image_text_hidden_size=16),
        _image_and_masked_text,
    ),
    "BLIP, tower": ByClass("BlipVisionModel", "BlipVisionConfig", VIT),
    "Chinese-CLIP, image and text": ByClass(
        "ChineseCLIPModel", "ChineseCLIPConfig", two(VIT, TEXT, projection_dim=16), image_and_text()
    ),
    "Chinese-CLIP, tower": ByClass("ChineseCLIPVisionModel", "ChineseCLIPVisionConfig", VIT),
    "CLIP, classifier": ByClass("CLIPForImageClassification", "CLIPConfig", two(VIT, TEXT, num_labels=3)),
    "CLIP, image and text": ByClass(
        "CLIPModel", "CLIPConfig", two(VIT, CLIP_TEXT, projection_dim=16), image_and_text()
    ),
    "CLIP, tower": ByClass("CLIPVisionModel", "CLIPVisionConfig", VIT),
    "CLIP, tower with projection": ByClass("CLIPVisionModelWithProjection", "CLIPVisionConfig", VIT),
    "DPT, depth": ByClass("DPTForDepthEstimation", "DPTConfig", _DPT),
    "DPT, segmentation": ByClass("DPTForSemanticSegmentation", "DPTConfig", _DPT),
    "GLPN, depth": ByClass(
        "GLPNForDepthEstimation", "GLPNConfig", {**_STAGES, "decoder_hidden_size": 8}, lambda: image(64)
    ),
    "ImageGPT": ByClass(
        "ImageGPTForImageClassification",
        "ImageGPTConfig",
        _GPT,
        lambda: {"input_ids": torch.arange(32).reshape(2, 16) % 16},
    ),
    "InternVL, chat": ByClass(
        "InternVLForConditionalGeneration",
        "InternVLConfig",
        {
            "vision_config": ("InternVLVisionConfig", {**VIT, "image_size": [32, 32], "patch_size": [8, 8]}),
            "text_config": ("Qwen2Config", _LLM),
            "image_token_id": 59,
            "image_seq_length": 4,
        },
        _chat(4),
    ),
    "InternVL, tower": ByClass(
        "InternVLVisionModel", "InternVLVisionConfig", {**VIT, "image_size": [32, 32], "patch_size": [8, 8]}
    ),
    "LLaVA, chat": ByClass(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "vision_config": ("CLIPVisionConfig", VIT),
            "text_config": ("LlamaConfig", _LLM),
            "image_token_index": 59,
            "image_seq_length": 16,
        },
        _chat(16),
    ),
    "LW-DETR ViT": ByClass(
        "LwDetrViTBackbone",
        "LwDetrViTConfig",
        {
            **RATIO,
            "image_size": 64,
            "pretrain_image_size": 64,
            "num_windows": 4,
            "out_indices": [1, 2],
            "window_block_indices": [0],
        },
    ),
    "MaskFormer-Swin, backbone": ByClass("MaskFormerSwinBackbone", "MaskFormerSwinConfig", SWIN),
    "MetaCLIP 2, classifier": ByClass(
        "MetaClip2ForImageClassification", "MetaClip2Config", two(VIT, TEXT, num_labels=3)
    ),
    "MetaCLIP 2, image and text": ByClass(
        "MetaClip2Model", "MetaClip2Config", two(VIT, CLIP_TEXT, projection_dim=16), image_and_text()
    ),
    "MetaCLIP 2, tower": ByClass("MetaClip2VisionModel", "MetaClip2VisionConfig", VIT),
    "Perceiver, Fourier positions": ByClass(
        "PerceiverForImageClassificationFourier",
        "PerceiverConfig",
        {**_PERCEIVER, **_PERCEIVER_HEADS, "d_model": 261, "image_size": 32},
        image,
    ),
    "Pixtral, tower": ByClass(
        "PixtralVisionModel",
        "PixtralVisionConfig",
        {**VIT, "head_dim": 8},
        lambda: {"pixel_values": image(), "image_sizes": torch.tensor([[32, 32], [32, 32]])},
    ),
    "Qwen2-VL, tower": ByClass(
        "qwen2_vl.modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel",
        "qwen2_vl.configuration_qwen2_vl.Qwen2VLVisionConfig",
        {**QWEN, "embed_dim": 32, "mlp_ratio": 2},
        packed,
    ),
    "Qwen2.5-VL, tower": ByClass(
        "qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel",
        "qwen2_5_vl.configuration_qwen2_5_vl.Qwen2_5_VLVisionConfig",
        {**QWEN, "intermediate_size": 64, "window_size": 16, "fullatt_block_indexes": [1], "out_hidden_size": 32},
        packed,
    ),
    "RF-DETR DINOv2": ByClass(
        "RfDetrDinov2Backbone",
        "rf_detr.configuration_rf_detr.RfDetrDinov2Config",
        {**RATIO, "num_windows": 2, "out_indices": [1, 2], "window_block_indexes": [0]},
    ),
    "Sapiens2, segmentation": ByClass(
        "Sapiens2ForSemanticSegmentation",
        "Sapiens2Config",
        {**VIT, **_SAPIENS, "head_config": _SAPIENS_HEAD, "num_labels": 3},
    ),
    "SegFormer, segmentation": ByClass(
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        {**_STAGES, "decoder_hidden_size": 16, "num_labels": 3},
        lambda: image(64),
    ),
    "SigLIP, classifier": ByClass("SiglipForImageClassification", "SiglipConfig", two(VIT, TEXT, num_labels=3)),
    "SigLIP, image and text": ByClass("SiglipModel", "SiglipConfig", two(VIT, _SIGLIP_TEXT), image_and_text()),
    "SigLIP, tower": ByClass("SiglipVisionModel", "SiglipVisionConfig", VIT),
    "SigLIP 2 (NaFlex), classifier": ByClass(
        "Siglip2ForImageClassification", "Siglip2Config", two(_NAFLEX, TEXT, num_labels=3), _naflex
    ),
    "SigLIP 2 (NaFlex), image and text": ByClass(
        "Siglip2Model", "Siglip2Config", two(_NAFLEX, _SIGLIP_TEXT), lambda: {"input_ids": ids(), **_naflex()}
    ),
    "SigLIP 2 (NaFlex), tower": ByClass("Siglip2VisionModel", "Siglip2VisionConfig", _NAFLEX, _naflex),
    "Swin2SR, super-resolution": ByClass(
        "Swin2SRForImageSuperResolution",
        "Swin2SRConfig",
        {"embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "image_size": 16, "window_size": 4},
    ),
    "TimeSformer": ByClass("TimesformerForVideoClassification", "TimesformerConfig", {**_VIDEO, "num_frames": 2}),
    "TIPSv2, image and text": ByClass("Tipsv2Model", "Tipsv2Config", two(RATIO, TEXT), image_and_text()),
    "V-JEPA 2": ByClass(
        "VJEPA2ForVideoClassification",
        "VJEPA2Config",
        {**_VJEPA, **_PREDICTOR, "frames_per_clip": 4, "num_pooler_layers": 1, "num_labels": 3},
    ),
    "V-JEPA 2, encoder and predictor": ByClass(
        "VJEPA2Model", "VJEPA2Config", {**_VJEPA, **_PREDICTOR, "frames_per_clip": 4, "num_pooler_layers": 1}
    ),
    "VideoMAE": ByClass("VideoMAEForVideoClassification", "VideoMAEConfig", {**_VIDEO, "num_frames": 4}),
    "VideoPrism": ByClass(
        "VideoPrismForVideoClassification", "VideoPrismVisionConfig", {**_PRISM, **_PRISM_LAYERS, "num_labels": 3}
    ),
    "VideoPrism, encoder": ByClass("VideoPrismVisionModel", "VideoPrismVisionConfig", {**_PRISM, **_PRISM_LAYERS}),
    "ViTDet, backbone": ByClass(
        "VitDetBackbone", "VitDetConfig", {**_VITDET, "use_relative_position_embeddings": True}
    ),
    "ViTPose": ByClass(
        "VitPoseForPoseEstimation", "VitPoseConfig", {"backbone_config": ("VitPoseBackboneConfig", _POSE)}
    ),
    "ViTPose, backbone": ByClass("VitPoseBackbone", "VitPoseBackboneConfig", _POSE),
    "ViTPose++, backbone (experts)": ByClass(
        "VitPoseBackbone",
        "VitPoseBackboneConfig",
        {**_POSE, "num_experts": 3, "part_features": 8},
        lambda: {"pixel_values": torch.zeros(2, 3, 32, 24), "dataset_index": torch.tensor([0, 1])},
    ),
    "ViViT": ByClass(
        "VivitForVideoClassification",
        "VivitConfig",
        {**SMALL, "intermediate_size": 64, "image_size": 32, "num_frames": 4, "tubelet_size": [2, 8, 8]},
    ),
    "YOLOS, detection": ByClass(
        "YolosForObjectDetection",
        "YolosConfig",
        {**VIT, "image_size": [32, 32], "num_detection_tokens": 4, "num_labels": 3},
    ),
}
"""Models by family, alphabetical."""
