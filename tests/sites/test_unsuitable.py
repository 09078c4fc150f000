"""Models that cannot be read as they are: the error names why, and what to attach to instead."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import petune
from petune.base.errors import AttachError, SiteNotFound
from tests.tiny import tiny

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
}
VIDEO = {**SMALL, "num_frames": 2}


VIDEO_MODELS: list[Any] = [
    lambda: transformers.TimesformerForVideoClassification(
        transformers.TimesformerConfig(**VIDEO, patch_size=8, num_labels=5)
    ),
    lambda: transformers.VivitForVideoClassification(
        transformers.VivitConfig(**VIDEO, tubelet_size=[2, 8, 8], num_labels=5)
    ),
    lambda: transformers.VideoMAEForVideoClassification(
        transformers.VideoMAEConfig(**VIDEO, patch_size=8, tubelet_size=2, num_labels=5)
    ),
]


def test_video_models_of_transformers_tell_their_input() -> None:
    for build in VIDEO_MODELS:
        att = petune.attach(build(), "adaptformer")
        assert att.sites.input_size == (2, 3, 32, 32)
        assert len(att.sites.blocks) == 2


def test_a_video_model_that_is_given_the_size_of_images_is_told_of_example() -> None:
    with pytest.raises(petune.AttachError, match=r"takes videos.* example=torch.zeros\(1, frames") as error:
        petune.attach(VIDEO_MODELS[0](), "adaptformer", input_size=(3, 32, 32))
    assert "input_size" not in str(error.value)


def test_scripted_modules_and_attention_outside_of_blocks_are_named() -> None:
    model = tiny()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        model.blocks[0].mlp.act = torch.jit.script(nn.GELU())
    with pytest.raises(AttachError, match=r"blocks\.0\.mlp\.act of VisionTransformer was compiled by torch\.jit"):
        petune.attach(model, "linear")

    class Inline(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 24, 4, 4)
            self.qkv = nn.ModuleList(nn.Linear(24, 72) for _ in range(2))
            self.head = nn.Linear(24, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.patches(x).flatten(2).mT
            for layer in self.qkv:
                x = x + nn.functional.scaled_dot_product_attention(*layer(x).chunk(3, -1))
            logits: torch.Tensor = self.head(x.mean(1))
            return logits

    with pytest.raises(SiteNotFound, match="attend to each other in the model's own forward"):
        petune.attach(Inline(), "adaptformer", input_size=(3, 16, 16))


class Bottleneck(nn.Module):
    """BotNet's block: an attention between two convolutions, no MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.reduce, self.qkv, self.expand = nn.Conv2d(24, 12, 1), nn.Conv2d(12, 36, 1), nn.Conv2d(12, 24, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.reduce(x)).flatten(2).mT.chunk(3, -1)
        y = nn.functional.scaled_dot_product_attention(q, k, v).mT.unflatten(-1, x.shape[2:])
        z: torch.Tensor = x + self.expand(y)
        return z


def test_a_block_without_an_mlp_is_said_to_have_none() -> None:
    stem, head = nn.Conv2d(3, 24, 4, 4), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 3))
    with pytest.raises(SiteNotFound, match=r"no site 'mid' \(petune saw no MLP in it"):
        petune.attach(nn.Sequential(stem, Bottleneck(), head), "adaptformer", input_size=(3, 16, 16))


def test_of_two_towers_the_one_for_images_is_named() -> None:
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.CLIPConfig(
        vision_config={**SMALL, "patch_size": 8}, text_config={**text, "vocab_size": 50, "eos_token_id": 49}
    )
    model = transformers.CLIPModel(config)
    with pytest.raises(
        petune.AttachError, match=r"Attach to the one for images: model\.vision_model; or to both, with example="
    ):
        petune.find_sites(model, (3, 32, 32))
    assert len(petune.find_sites(model.vision_model, (3, 32, 32)).blocks) == 2


@pytest.mark.parametrize("method", ["adaptformer", "linear", "vpt"])
def test_layers_that_torch_ao_has_quantized_are_named(method: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(tiny(), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(petune.AttachError, match=r"blocks\.0\.attn\.qkv .* quantized by torch\.ao.*torchao"):
        petune.attach(model, method)
