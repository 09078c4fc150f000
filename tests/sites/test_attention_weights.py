"""Attention weights are those that the model computes, fused or not; a forward with the recorder gives the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn

import petune
from petune.sites.attention_weights import record_attention
from tests.tiny import tiny

HF = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_labels": 5,
    "image_size": 28,
    "patch_size": 7,
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "timm": tiny,
    "timm, class token and registers": lambda: tiny(reg_tokens=4),
    "timm, no class token": lambda: tiny(class_token=False, global_pool="avg"),
    "dinov3": lambda: timm.create_model("vit_small_patch16_dinov3", depth=2, img_size=64, num_classes=5),
    "torchvision": lambda: torchvision.models.VisionTransformer(28, 7, 2, 3, 48, 96, num_classes=5),
    "transformers": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**HF)),
    "dinov2": lambda: transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**HF)),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_block_has_the_weights_of_all_tokens(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    sites = petune.find_sites(model)
    assert sites.grid_size is not None
    num_tokens = sites.num_prefix_tokens + sites.grid_size[0] * sites.grid_size[1]
    x = torch.randn(2, *sites.input_size)
    with torch.inference_mode():
        before = _logits(model(x))
        with record_attention(sites.blocks) as weights:
            during = _logits(model(x))
        after = _logits(model(x))
    assert sorted(weights) == list(range(len(sites.blocks)))
    for weights_BNN in weights.values():
        assert weights_BNN.shape == (2, num_tokens, num_tokens)
        assert weights_BNN.sum(-1) == pytest.approx(1, abs=1e-5)
        assert weights_BNN.std() > 0
    torch.testing.assert_close(during, before)
    assert torch.equal(after, before)


def _logits(output: object) -> Tensor:
    logits = getattr(output, "logits", output)
    assert isinstance(logits, Tensor)
    return logits


@pytest.mark.parametrize("mask", [None, "float", "bool"])
def test_fused_attention_has_the_weights_that_it_applies(mask: str | None) -> None:
    class Attend(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            bias = {"float": torch.arange(25.0).view(5, 5), "bool": torch.eye(5).bool(), None: None}[mask]
            q_and_k = {"query": x, "key": x.flip(2), "value": torch.eye(5)}
            return nn.functional.scaled_dot_product_attention(**q_and_k, attn_mask=bias, scale=0.3)

    class Block:
        index, parts = 0, {}

    attend, block = Attend(), Block()
    block.enter = block.exit = attend  # type: ignore[attr-defined]
    with record_attention([block]) as weights:  # type: ignore[list-item]
        applied = attend(torch.randn(1, 2, 5, 8))
    torch.testing.assert_close(weights[0], applied.mean(1))


def test_windows_are_no_attention_over_the_image() -> None:
    model = timm.create_model("swin_tiny_patch4_window7_224", depths=(1,), num_classes=2).eval()
    sites = petune.find_sites(model)
    with torch.inference_mode(), record_attention(sites.blocks) as weights:
        model(torch.randn(1, *sites.input_size))
    assert all(len(one) > 1 for one in weights.values())  # one for each window, not for each image
