"""Models of transformers that read text, documents and videos with words, as whole models."""

from __future__ import annotations

from typing import Any

import torch

from survey.transformers_classes import SMALL, ByClass, ids, image
from survey.transformers_dense import HGNET_SIZES

_OCR = {"hidden_size": 32, "depth": 2, "head_out_channels": 7, "num_attention_heads": 2}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "vocab_size": 50}


def _line_of_text() -> torch.Tensor:
    return torch.zeros(2, 3, 48, 320)


def _document() -> dict[str, Any]:
    boxes = torch.tensor([[0.1, 0.1, 0.3, 0.2]] * 6)
    return {"input_ids": ids(), "bbox": boxes[: ids().shape[1]].expand(2, -1, -1), "pixel_values": image()}


READING: dict[str, ByClass] = {
    "PE video, encoder": ByClass(
        "PeVideoEncoder",
        "PeVideoEncoderConfig",
        {
            **SMALL,
            "intermediate_size": 64,
            "head_dim": 8,
            "vision_config": (
                "TimmWrapperConfig",
                {
                    "architecture": "vit_pe_core_tiny_patch16_384",
                    "model_args": {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 4},
                    "num_classes": 16,
                },
            ),
        },
        lambda: {"pixel_values_videos": torch.zeros(2, 3, 3, 32, 32)},
    ),
    "PP-OCRv5, server": ByClass(
        "PPOCRV5ServerRecForTextRecognition",
        "PPOCRV5ServerRecConfig",
        {
            **_OCR,
            "backbone_config": (
                "HGNetV2Config",
                {
                    **HGNET_SIZES,
                    "out_features": ["stage1", "stage2", "stage3", "stage4"],
                    "stage_downsample": [True, True, True, True],
                    "stem_strides": [2, 1, 1, 1, 1],
                    "stage_downsample_strides": [[2, 1], [1, 2], [2, 1], [2, 1]],
                },
            ),
        },
        _line_of_text,
    ),
    "UDOP, encoder": ByClass(
        "UdopEncoderModel",
        "UdopConfig",
        {**_T5, "image_size": 32, "patch_size": 8, "max_2d_position_embeddings": 64},
        _document,
    ),
}
"""Models by family, alphabetical."""
