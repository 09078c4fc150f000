"""An encoder inside a head is frozen and adapted as other towers are; a decoder inside a head trains with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import petune
from tests.sites.test_towers import Block, D

LEFT = {"fov_model.fov_encoder.neck", "fov_model.conv", "fov_model.head"}


def depth_pro() -> Any:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
    vit = {"model_type": "dinov2", **sizes}
    config = transformers.DepthProConfig(
        fusion_hidden_size=8,
        patch_size=16,
        intermediate_hook_ids=[1, 0],
        intermediate_feature_dims=[8, 8],
        scaled_images_ratios=[0.5, 1.0],
        scaled_images_overlap_ratios=[0.0, 0.25],
        scaled_images_feature_dims=[8, 8],
        num_fov_head_layers=1,
        use_fov_model=True,
        image_model_config=vit,
        patch_model_config=vit,
        fov_model_config=vit,
    )
    return transformers.DepthProForDepthEstimation(config).eval()


def test_the_encoder_of_depth_pros_field_of_view_is_a_tower(tmp_path: Path) -> None:
    depth_pro().save_pretrained(tmp_path)
    model = transformers.DepthProForDepthEstimation.from_pretrained(tmp_path).eval()
    sites = petune.find_sites(model, example=torch.randn(2, 3, 32, 32))
    assert {path for path, _ in sites.head.named_modules} == {"fusion_stage", "head", *LEFT}
    ends = [(t.blocks[-1].path, t.norm.path if t.norm else "") for t in sites.towers]
    encoder = "fov_model.fov_encoder.model"
    assert (f"{encoder}.encoder.layer.1", f"{encoder}.layernorm") in ends
    att = petune.attach(model, "adaptformer", bottleneck=2, sites=sites)
    assert any(key.startswith(f"{encoder}.encoder.layer.0") for key in att.tuned)
    assert not any(key.startswith(encoder) for key in att.head)


def test_an_encoder_that_the_checkpoint_lacks_trains(tmp_path: Path) -> None:
    model = depth_pro()
    state = {key: t for key, t in model.state_dict().items() if not key.startswith("fov_model")}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = transformers.DepthProForDepthEstimation.from_pretrained(tmp_path).eval()
    heads = petune.find_sites(loaded, example=torch.randn(2, 3, 32, 32)).head.named_modules
    assert {path for path, _ in heads} == {"fusion_stage", "head", "fov_model"}


class Head(nn.Module):
    """Blocks that read the image themselves (`side`), or what the encoder made, and a classifier of both."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.stem, self.blocks = nn.Conv2d(3, D, 4, 4), nn.ModuleList(Block() for _ in range(2))
        self.unused, self.norm, self.neck = nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, D)
        self.queries, self.map = nn.Parameter(torch.zeros(1, 5, D)), nn.Linear(D, D)
        self.fuse, self.classes = Block(), nn.Linear(D, 3)

    def forward(self, image: Tensor, features: Tensor) -> Tensor:
        side = self.stem(image).flatten(2).mT if self.kind != "decoder" else self.map(features)
        if self.kind == "queries":
            side = self.queries.expand(len(image), -1, -1)
        for block in self.blocks:
            side = block(side)
        self.unused(side)
        features = self.fuse(self.neck(self.norm(side)), self.map(features))
        return self.classes(features.mean(1))  # type: ignore[no-any-return]


class Model(nn.Module):
    image_size = 16

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, D, 4, 4), nn.ModuleList(Block() for _ in range(2))
        self.head = Head(kind)

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image).flatten(2).mT
        for block in self.blocks:
            x = block(x)
        return self.head(image, x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "heads", "blocks"),
    [
        ("side", {"head.neck", "head.map", "head.fuse", "head.classes"}, 4),
        ("decoder", {"head"}, 2),
        ("queries", {"head"}, 2),
    ],
)
def test_blocks_in_a_head_are_a_tower_if_they_read_the_image(kind: str, heads: set[str], blocks: int) -> None:
    sites = petune.find_sites(Model(kind).eval())
    assert {path for path, _ in sites.head.named_modules} == heads
    assert len(sites.blocks) == blocks


def test_an_encoder_that_a_user_names_trains_whole() -> None:
    att = petune.attach(Model("side").eval(), "linear", head="head")
    assert any(key.startswith("head.blocks.0.") for key in att.head)
