"""Whole models of transformers for detection, segmentation and depth: encoder and decoder on a backbone."""

from __future__ import annotations

from typing import Any

import torch

from survey.transformers_classes import ByClass, image

_STAGES = ["stage1", "stage2", "stage3", "stage4"]
HGNET_SIZES = {
    "embedding_size": 8,
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [16, 16, 32, 32],
    "stem_channels": [3, 8, 8],
    "stage_in_channels": [8, 16, 16, 32],
    "stage_mid_channels": [8, 8, 8, 8],
    "stage_out_channels": [16, 16, 32, 32],
    "stage_num_blocks": [1, 1, 1, 1],
    "stage_numb_of_layers": [1, 1, 1, 1],
    "initializer_range": 0.4,  # or the signal dies before the first BatchNorm, which then amplifies rounding
}
_TWO = {"image_size": 32, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
_COLUMN = {**_TWO, "intermediate_size": 32}
_TEXT = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 8,
    "pad_token_id": 0,
    "bos_token_id": 48,
    "eos_token_id": 49,
}
_DETR = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "num_queries": 5,
    "num_labels": 3,
}
_RT_DETR = {
    "encoder_hidden_dim": 32,
    "encoder_in_channels": [16, 32, 32],
    "encoder_ffn_dim": 32,
    "encoder_attention_heads": 2,
    "d_model": 32,
    "decoder_in_channels": [32, 32, 32],
    "decoder_ffn_dim": 32,
    "decoder_attention_heads": 2,
    "decoder_layers": 2,
    "num_queries": 8,
    "num_denoising": 0,
    "hidden_expansion": 0.5,
    "num_labels": 3,
    "eval_size": None,
    "initializer_range": 0.2,  # or all proposals score nearly the same, and rounding chooses among them
}
_WINDOWED_DETR = {
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_self_attention_heads": 2,
    "decoder_cross_attention_heads": 2,
    "decoder_ffn_dim": 16,
    "num_queries": 5,
    "group_detr": 1,
    "num_labels": 3,
    "projector_scale_factors": [1.0],
}
_MASKS = {
    "feature_size": 32,
    "mask_feature_size": 32,
    "hidden_dim": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "num_attention_heads": 2,
    "encoder_feedforward_dim": 16,
    "dim_feedforward": 16,
    "num_queries": 5,
    "num_labels": 3,
}


def _resnet(*stages: str, kind: str = "ResNetConfig") -> tuple[str, dict[str, Any]]:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16, 32, 32], "depths": [1, 1, 1, 1], "layer_type": "basic"}
    return kind, {**sizes, "out_features": list(stages or _STAGES[3:])}


def _swin(*stages: str) -> tuple[str, dict[str, Any]]:
    sizes = {"image_size": 64, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4}
    return "SwinConfig", {**sizes, "out_features": list(stages or _STAGES)}


def _hgnet() -> tuple[str, dict[str, Any]]:
    return "HGNetV2Config", {**HGNET_SIZES, "out_features": _STAGES[1:]}


def _large() -> torch.Tensor:
    return image(64)


def _prompted(size: int) -> dict[str, Any]:
    points = torch.tensor([[[[4.0, 9.0], [20.0, 25.0]]]]).expand(2, 1, 2, 2)
    return {"pixel_values": image(size), "input_points": points, "input_labels": torch.ones(2, 1, 2, dtype=torch.long)}


def _words() -> torch.Tensor:
    return torch.tensor([[1, 5, 7, 9, 2, 49], [1, 8, 3, 2, 6, 49]])


def _image_and_words() -> dict[str, Any]:
    ids = _words()
    return {
        "pixel_values": image(64),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
    }


def _image_and_classes() -> dict[str, Any]:
    classes, task = torch.cat([_words(), _words()]), _words()
    return {
        "pixel_values": image(64),
        "classes_input_ids": classes,
        "classes_attention_mask": torch.ones_like(classes),
        "tasks_input_ids": task,
        "tasks_attention_mask": torch.ones_like(task),
        "classes_structure": torch.tensor([2, 2]),
    }


_GROUNDING = {
    "backbone_config": _swin(*_STAGES[1:]),
    "text_config": ("BertConfig", {k: v for k, v in _TEXT.items() if k != "max_position_embeddings"}),
    **_DETR,
    "d_model": 32,
    "num_feature_levels": 3,
    "max_text_len": 8,
}
_PROMPTS = {"hidden_size": 32, "mask_input_channels": 4}
_MASK_DECODER = {"hidden_size": 32, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16}

DENSE: dict[str, ByClass] = {
    "CLIPSeg, segmentation": ByClass(
        "CLIPSegForImageSegmentation",
        "CLIPSegConfig",
        {
            "text_config": {**_TEXT, "num_hidden_layers": 3},
            "vision_config": {**_COLUMN, "num_hidden_layers": 3},
            "projection_dim": 16,
            "extract_layers": [0, 1, 2],
            "reduce_dim": 8,
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 16,
            "conditional_layer": 0,
        },
        lambda: {"input_ids": _words(), "pixel_values": image(), "attention_mask": torch.ones_like(_words())},
    ),
    "Conditional DETR": ByClass(
        "ConditionalDetrForObjectDetection",
        "ConditionalDetrConfig",
        {"backbone_config": _resnet(), **_DETR},
        _large,
    ),
    "D-FINE": ByClass("DFineForObjectDetection", "DFineConfig", {"backbone_config": _hgnet(), **_RT_DETR}, _large),
    "DAB-DETR": ByClass(
        "DabDetrForObjectDetection",
        "DabDetrConfig",
        {"backbone_config": _resnet(), **_DETR, "hidden_size": 16},
        _large,
    ),
    "Deformable DETR": ByClass(
        "DeformableDetrForObjectDetection",
        "DeformableDetrConfig",
        {"backbone_config": _resnet(*_STAGES[1:]), **_DETR, "d_model": 32, "num_feature_levels": 3},
        _large,
    ),
    "DEIMv2": ByClass(
        "Deimv2ForObjectDetection",
        "Deimv2Config",
        {"backbone_config": _hgnet(), **_RT_DETR, "lqe_hidden_dim": 16},
        _large,
    ),
    "Depth Anything": ByClass(
        "DepthAnythingForDepthEstimation",
        "DepthAnythingConfig",
        {
            "backbone_config": (
                "Dinov2Config",
                {**_TWO, "out_features": _STAGES, "reshape_hidden_states": False, "apply_layernorm": True},
            ),
            "patch_size": 8,
            "reassemble_hidden_size": 16,
            "neck_hidden_sizes": [8, 8, 16, 16],
            "fusion_hidden_size": 16,
            "head_hidden_size": 8,
            "initializer_range": 0.15,
        },
        image,
    ),
    "DETR": ByClass("DetrForObjectDetection", "DetrConfig", {"backbone_config": _resnet(), **_DETR}, _large),
    "DETR on DINOv2": ByClass(
        "DetrForObjectDetection",
        "DetrConfig",
        {"backbone_config": ("Dinov2Config", {**_TWO, "out_features": ["stage4"]}), **_DETR},
        image,
    ),
    "Grounding DINO": ByClass("GroundingDinoForObjectDetection", "GroundingDinoConfig", _GROUNDING, _image_and_words),
    "LW-DETR": ByClass(
        "LwDetrForObjectDetection",
        "LwDetrConfig",
        {
            "backbone_config": (
                "LwDetrViTConfig",
                {
                    **_TWO,
                    "image_size": 64,
                    "pretrain_image_size": 64,
                    "window_block_indices": [0, 2],
                    "out_features": ["stage2", "stage4"],
                    "num_windows": 4,
                },
            ),
            **_WINDOWED_DETR,
        },
        _large,
    ),
    "Mask2Former": ByClass(
        "Mask2FormerForUniversalSegmentation", "Mask2FormerConfig", {"backbone_config": _swin(), **_MASKS}, _large
    ),
    "MaskFormer": ByClass(
        "MaskFormerForInstanceSegmentation",
        "MaskFormerConfig",
        {
            "backbone_config": _swin(),
            "decoder_config": ("DetrConfig", {**_DETR, "d_model": 32}),
            "fpn_feature_size": 32,
            "mask_feature_size": 32,
            "num_labels": 3,
        },
        _large,
    ),
    "MM Grounding DINO": ByClass(
        "MMGroundingDinoForObjectDetection", "MMGroundingDinoConfig", _GROUNDING, _image_and_words
    ),
    "OmDet-Turbo": ByClass(
        "OmDetTurboForObjectDetection",
        "OmDetTurboConfig",
        {
            "backbone_config": _swin(*_STAGES[1:]),
            "text_config": ("CLIPTextConfig", {**_TEXT, "projection_dim": 32}),
            "apply_layernorm_after_vision_backbone": False,
            "image_size": 64,
            "text_projection_in_dim": 32,
            "text_projection_out_dim": 32,
            "task_encoder_hidden_dim": 16,
            "class_embed_dim": 32,
            "num_queries": 8,
            "encoder_hidden_dim": 16,
            "vision_features_channels": [16, 16, 16],
            "encoder_in_channels": [16, 32, 64],
            "encoder_attention_heads": 2,
            "encoder_dim_feedforward": 32,
            "decoder_hidden_dim": 16,
            "decoder_num_heads": 2,
            "decoder_num_layers": 2,
            "decoder_dim_feedforward": 32,
        },
        _image_and_classes,
    ),
    "OneFormer": ByClass(
        "OneFormerForUniversalSegmentation",
        "OneFormerConfig",
        {
            "backbone_config": _swin(),
            **{k: v for k, v in _MASKS.items() if k not in ("feature_size", "mask_feature_size")},
            "conv_dim": 32,
            "mask_dim": 32,
            "text_encoder_width": 32,
            "text_encoder_num_layers": 1,
            "text_encoder_vocab_size": 50,
            "text_encoder_context_length": 8,
            "task_seq_len": 8,
            "text_encoder_n_ctx": 2,
            "query_dec_layers": 1,
        },
        lambda: {"pixel_values": image(64), "task_inputs": torch.arange(16).reshape(2, 8)},
    ),
    "PP-DocLayoutV2": ByClass(
        "PPDocLayoutV2ForObjectDetection",
        "PPDocLayoutV2Config",
        {
            "backbone_config": _hgnet(),
            **_RT_DETR,
            "class_thresholds": [0.5, 0.5, 0.5],
            "class_order": [0, 1, 2],
            "reading_order_config": (
                "pp_doclayout_v2.configuration_pp_doclayout_v2.PPDocLayoutV2ReadingOrderConfig",
                {
                    "hidden_size": 32,
                    "num_attention_heads": 2,
                    "intermediate_size": 32,
                    "num_hidden_layers": 2,
                    "coordinate_size": 6,
                    "shape_size": 4,
                    "num_classes": 3,
                    "relation_bias_embed_dim": 4,
                    "global_pointer_head_size": 8,
                },
            ),
        },
        _large,
    ),
    "RF-DETR": ByClass(
        "RfDetrForObjectDetection",
        "RfDetrConfig",
        {
            "backbone_config": (
                "rf_detr.configuration_rf_detr.RfDetrDinov2Config",
                {**_TWO, "num_windows": 1, "out_features": ["stage2", "stage4"]},
            ),
            **_WINDOWED_DETR,
        },
        image,
    ),
    "RT-DETR": ByClass(
        "RTDetrForObjectDetection",
        "RTDetrConfig",
        {"backbone_config": _resnet(*_STAGES[1:], kind="RTDetrResNetConfig"), **_RT_DETR},
        _large,
    ),
    "RT-DETR v2": ByClass(
        "RTDetrV2ForObjectDetection",
        "RTDetrV2Config",
        {"backbone_config": _resnet(*_STAGES[1:], kind="RTDetrResNetConfig"), **_RT_DETR},
        _large,
    ),
    "SAM, prompted": ByClass(
        "SamModel",
        "SamConfig",
        {
            "vision_config": {
                **_TWO,
                "num_hidden_layers": 2,
                "output_channels": 32,
                "window_size": 2,
                "global_attn_indexes": [1],
                "mlp_dim": 32,
                "num_pos_feats": 16,
            },
            "prompt_encoder_config": {**_PROMPTS, "image_size": 32, "patch_size": 8},
            "mask_decoder_config": _MASK_DECODER,
        },
        lambda: _prompted(32),
    ),
    "Table Transformer": ByClass(
        "TableTransformerForObjectDetection",
        "TableTransformerConfig",
        {"backbone_config": _resnet(), **_DETR},
        _large,
    ),
}
"""Models by family, alphabetical."""
