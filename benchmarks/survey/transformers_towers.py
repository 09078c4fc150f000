"""The vision towers of transformers' chat and OCR models, and whole models, built by their class: see `coverage.py`."""

from __future__ import annotations

from typing import Any

import torch

from survey.transformers_classes import QWEN, RATIO, SAM, SMALL, VIT, ByClass, Example, image, packed

GRID = torch.tensor([[1, 4, 4]])
"""Frames, rows and columns of patches of the one image in a row of patches."""


def grid(frames: int = 1, name: str = "pixel_values") -> Example:
    """Return an example of the 4 x 4 patches of one image, of 4 x 4 pixels each, as rows."""
    return lambda: {name: torch.randn(16, frames * 3 * 4 * 4), "grid_thw": GRID}


def small_patches() -> dict[str, Any]:
    """Return the 4 x 4 patches of one image, as small images."""
    return {"pixel_values": torch.randn(16, 3, 4, 4), "grid_thw": GRID}


def _flat_patches() -> dict[str, Any]:
    """Return two images as rows that begin with the row and column of a patch."""
    positions = torch.cartesian_prod(torch.arange(1.0, 5), torch.arange(1.0, 5)).expand(2, 16, 2)
    return {"flattened_patches": torch.cat([positions, torch.randn(2, 16, 48)], -1)}


def _patches_in_one_row() -> dict[str, Any]:
    """Return one image whose patches are next to each other in one row."""
    return {"pixel_values": torch.randn(1, 3, 8, 16 * 8), "target_sizes": torch.tensor([[4, 4]])}


def _positions() -> dict[str, Any]:
    positions = torch.cartesian_prod(torch.arange(4), torch.arange(4)).expand(2, 16, 2)
    return {"pixel_values": torch.rand(2, 16, 48), "pixel_position_ids": positions}


_PACKED = {**SMALL, "intermediate_size": 64, "patch_size": 4}
_QWEN3 = {**QWEN, "intermediate_size": 64, "out_hidden_size": 32, "num_position_embeddings": 16}
_GLM = {**QWEN, "intermediate_size": 64, "image_size": 16, "out_hidden_size": 32}
_MINICPM = {**VIT, "num_hidden_layers": 3, "insert_layer_id": 1}
_MUSE = {**_PACKED, "pos_emb_height": 4, "pos_emb_width": 4, "max_position_embeddings": 16}
_MUSE_LAYERS = {"layer_types": ["window_attention", "full_attention"]}

TOWERS: dict[str, ByClass] = {
    "BridgeTower, tower": ByClass(
        "bridgetower.modeling_bridgetower.BridgeTowerVisionModel",
        "BridgeTowerVisionConfig",
        {"hidden_size": 128, "num_hidden_layers": 2, "image_size": 32, "patch_size": 8},
    ),
    "CLIPSeg, tower": ByClass("CLIPSegVisionModel", "CLIPSegVisionConfig", VIT),
    "Cohere Compass, tower": ByClass(
        "cohere_compass.modeling_cohere_compass.CohereCompassVisionModel",
        "cohere_compass.configuration_cohere_compass.CohereCompassVisionConfig",
        {**_QWEN3, "deepstack_visual_indexes": [0]},
        packed,
    ),
    "Cosmos 3 Edge, tower": ByClass(
        "cosmos3_edge.modeling_cosmos3_edge.Cosmos3EdgeVisionModel",
        "cosmos3_edge.configuration_cosmos3_edge.Cosmos3EdgeVisionConfig",
        {**_PACKED, "num_patches": 16},
        grid(),
    ),
    "DeepSeek-OCR 2, image encoder": ByClass(
        "deepseek_ocr2.modeling_deepseek_ocr2.DeepseekOcr2SamVisionEncoder",
        "deepseek_ocr2.configuration_deepseek_ocr2.DeepseekOcr2SamVisionConfig",
        {**SAM, "downsample_channels": [16, 16]},
        lambda: image(64),
    ),
    "dots.note, tower": ByClass(
        "dots3_note.modeling_dots3_note.Dots3NoteVisionModel",
        "dots3_note.configuration_dots3_note.Dots3NoteVisionConfig",
        {
            **_PACKED,
            "moe_intermediate_size": 16,
            "num_local_experts": 4,
            "mlp_layer_types": ["dense", "sparse"],
            "per_layer_config": {},
            "adapter_in_dim": 32,
            "adapter_out_dim": 32,
        },
        grid(),
    ),
    "ERNIE 4.5 VL, tower": ByClass(
        "ernie4_5_vl_moe.modeling_ernie4_5_vl_moe.Ernie4_5_VLMoeVisionTransformerPretrainedModel",
        "ernie4_5_vl_moe.configuration_ernie4_5_vl_moe.Ernie4_5_VLMoeVisionConfig",
        {**QWEN, "intermediate_size": 64},
        grid(name="hidden_states"),
    ),
    "EXAONE 4.5, tower": ByClass(
        "exaone4_5.modeling_exaone4_5.Exaone4_5_VisionModel",
        "exaone4_5.configuration_exaone4_5.Exaone4_5_VisionConfig",
        {
            **QWEN,
            "intermediate_size": 64,
            "window_size": 16,
            "fullatt_block_indexes": [1],
            "out_hidden_size": 32,
            "num_key_value_heads": 2,
        },
        packed,
    ),
    "Gemma 4, tower": ByClass(
        "gemma4.modeling_gemma4.Gemma4VisionModel",
        "gemma4.configuration_gemma4.Gemma4VisionConfig",
        {
            **_PACKED,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "pooling_kernel_size": 2,
            "position_embedding_size": 16,
        },
        _positions,
    ),
    "GLM-4.5V, tower": ByClass(
        "glm4v_moe.modeling_glm4v_moe.Glm4vMoeVisionModel",
        "glm4v_moe.configuration_glm4v_moe.Glm4vMoeVisionConfig",
        _GLM,
        packed,
    ),
    "GLM-5 next, tower": ByClass(
        "glm5_next.modeling_glm5_next.Glm5NextVisionModel",
        "glm5_next.configuration_glm5_next.Glm5NextVisionConfig",
        {**_GLM, "projection_intermediate_size": 64},
        packed,
    ),
    "GLM-Image, tower": ByClass(
        "glm_image.modeling_glm_image.GlmImageVisionModel",
        "glm_image.configuration_glm_image.GlmImageVisionConfig",
        {**QWEN, "intermediate_size": 64, "image_size": 16},
        grid(),
    ),
    "GLM-OCR, tower": ByClass(
        "glm_ocr.modeling_glm_ocr.GlmOcrVisionModel", "glm_ocr.configuration_glm_ocr.GlmOcrVisionConfig", _GLM, packed
    ),
    "GOT-OCR 2, tower": ByClass(
        "got_ocr2.modeling_got_ocr2.GotOcr2VisionEncoder", "got_ocr2.configuration_got_ocr2.GotOcr2VisionConfig", SAM
    ),
    "Granite Docling, tower": ByClass(
        "granite_docling.modeling_granite_docling.GraniteDoclingVisionModel",
        "granite_docling.configuration_granite_docling.GraniteDoclingVisionConfig",
        {**VIT, "out_hidden_size": 32, "scale_factor": 2, "deepstack_visual_indexes": [0]},
    ),
    "HunYuan VL, tower": ByClass(
        "hunyuan_vl.modeling_hunyuan_vl.HunYuanVLVisionTransformer",
        "hunyuan_vl.configuration_hunyuan_vl.HunYuanVLVisionConfig",
        {**_PACKED, "num_key_value_heads": 4, "out_hidden_size": 32, "text_hidden_size": 32, "max_image_size": 64},
        grid(),
    ),
    "HY v4 VL, tower": ByClass(
        "hy_v4_vl.modeling_hy_v4_vl.HYV4VLVisionModel",
        "hy_v4_vl.configuration_hy_v4_vl.HYV4VLVisionConfig",
        {**_PACKED, "num_key_value_heads": 4, "out_hidden_size": 32, "max_image_size": 64},
        grid(),
    ),
    "Inkling 2, tower": ByClass(
        "inkling2.modeling_inkling2.Inkling2VisionModel",
        "inkling2.configuration_inkling2.Inkling2VisionConfig",
        {**_PACKED, "posemb_grid_size": 4, "projection_hidden_dim": 32, "text_hidden_size": 32},
        lambda: {"pixel_values": torch.randn(4, 8, 8, 3), "image_grid_thw": torch.tensor([[1, 2, 2]])},
    ),
    "Kimi K2.5, tower": ByClass(
        "kimi_k25.modeling_kimi_k25.Kimi_K25VisionModel",
        "kimi_k25.configuration_kimi_k25.Kimi_K25VisionConfig",
        {**_PACKED, "pos_emb_height": 4, "pos_emb_width": 4},
        small_patches,
    ),
    "Kosmos-2.5, tower": ByClass(
        "kosmos2_5.modeling_kosmos2_5.Kosmos2_5VisionModel",
        "kosmos2_5.configuration_kosmos2_5.Kosmos2_5VisionConfig",
        {**SMALL, "patch_embed_hidden_size": 48, "head_dim": 8, "intermediate_size": 64, "max_num_patches": 32},
        _flat_patches,
    ),
    "LFM3-VL, tower": ByClass(
        "lfm3_vl.modeling_lfm3_vl.Lfm3VlVisionModel",
        "lfm3_vl.configuration_lfm3_vl.Lfm3VlVisionConfig",
        {**_PACKED, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},
        grid(2),
    ),
    "MiniCPM-V 4.6, tower": ByClass(
        "minicpmv4_6.modeling_minicpmv4_6.MiniCPMV4_6VisionModel",
        "minicpmv4_6.configuration_minicpmv4_6.MiniCPMV4_6VisionConfig",
        _MINICPM,
        _patches_in_one_row,
    ),
    "MiniMax M3 VL, tower": ByClass(
        "minimax_m3_vl.modeling_minimax_m3_vl.MiniMaxM3VLVisionModel",
        "minimax_m3_vl.configuration_minimax_m3_vl.MiniMaxM3VLVisionConfig",
        {**_PACKED, "image_size": 16},
        grid(2),
    ),
    "Molmo 2, tower": ByClass(
        "molmo2.modeling_molmo2.Molmo2VisionModel",
        "molmo2.configuration_molmo2.Molmo2VisionConfig",
        {
            **VIT,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "image_size": [32, 32],
            "num_position_embeddings": 16,
        },
        lambda: torch.randn(2, 16, 192),
    ),
    "Muse Glimmer, tower": ByClass(
        "muse_glimmer.modeling_muse_glimmer.MuseGlimmerVisionModel",
        "muse_glimmer.configuration_muse_glimmer.MuseGlimmerVisionConfig",
        {**_MUSE, **_MUSE_LAYERS},
        grid(2),
    ),
    "PaddleOCR-VL, tower": ByClass(
        "paddleocr_vl.modeling_paddleocr_vl.PaddleOCRVisionModel",
        "paddleocr_vl.configuration_paddleocr_vl.PaddleOCRVisionConfig",
        {**_PACKED, "image_size": 16},
        lambda: {"pixel_values": torch.randn(1, 16, 3, 4, 4), "grid_thw": GRID},
    ),
    "PP-FormulaNet, tower": ByClass(
        "pp_formulanet.modeling_pp_formulanet.PPFormulaNetVisionModel",
        "pp_formulanet.configuration_pp_formulanet.PPFormulaNetVisionConfig",
        {
            **SAM,
            "post_conv_in_channels": 16,
            "post_conv_mid_channels": 16,
            "post_conv_out_channels": 16,
            "decoder_hidden_size": 16,
        },
    ),
    "Qianfan-OCR, tower": ByClass(
        "qianfan_ocr.modeling_qianfan_ocr.QianfanOCRVisionModel",
        "qianfan_ocr.configuration_qianfan_ocr.QianfanOCRVisionConfig",
        {**VIT, "image_size": [32, 32], "patch_size": [8, 8]},
    ),
    "Qwen2.5-Omni, tower": ByClass(
        "qwen2_5_omni.modeling_qwen2_5_omni.Qwen2_5OmniVisionEncoder",
        "qwen2_5_omni.configuration_qwen2_5_omni.Qwen2_5OmniVisionEncoderConfig",
        {**QWEN, "intermediate_size": 64, "window_size": 16, "fullatt_block_indexes": [1], "out_hidden_size": 32},
        packed,
    ),
    "Qwen3.5, tower": ByClass(
        "qwen3_5.modeling_qwen3_5.Qwen3_5VisionModel",
        "qwen3_5.configuration_qwen3_5.Qwen3_5VisionConfig",
        _QWEN3,
        packed,
    ),
    "Qwen3-Omni, tower": ByClass(
        "qwen3_omni_moe.modeling_qwen3_omni_moe.Qwen3OmniMoeVisionEncoder",
        "qwen3_omni_moe.configuration_qwen3_omni_moe.Qwen3OmniMoeVisionEncoderConfig",
        {**_QWEN3, "deepstack_visual_indexes": [0]},
        packed,
    ),
    "SAM HQ, image encoder": ByClass("sam_hq.modeling_sam_hq.SamHQVisionModel", "SamHQVisionConfig", SAM),
    "SLANeXt, image encoder": ByClass(
        "slanext.modeling_slanext.SLANeXtVisionEncoder", "slanext.configuration_slanext.SLANeXtVisionConfig", SAM
    ),
    "SmolVLM, tower": ByClass(
        "smolvlm.modeling_smolvlm.SmolVLMVisionTransformer", "smolvlm.configuration_smolvlm.SmolVLMVisionConfig", VIT
    ),
    "Step 3.7, tower": ByClass(
        "step3p7.modeling_step3p7.Step3p7VisionModel",
        "step3p7.configuration_step3p7.Step3p7VisionConfig",
        {
            **SMALL,
            "mlp_ratio": 2.0,
            "intermediate_size": 64,
            "image_size": 64,
            "patch_size": 8,
            "max_position_embeddings": 64,
        },
    ),
    "Video Mask Transformer": ByClass(
        "VideomtForUniversalSegmentation",
        "VideomtConfig",
        {
            **RATIO,
            "num_hidden_layers": 3,
            "num_blocks": 1,
            "num_queries": 5,
            "num_register_tokens": 1,
            "num_upscale_blocks": 1,
            "num_labels": 3,
        },
        lambda: {"pixel_values_videos": torch.randn(2, 2, 3, 32, 32)},
    ),
}
"""Models by family, alphabetical."""
