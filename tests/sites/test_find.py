"""find_sites on a plain ViT: its table, its messages, and that it does not change the model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch import nn

import petune
from petune.base.errors import AttachError, SiteNotFound

TABLE = """\
VisionTransformer: 2 blocks, width 24, grid 4x4, 1 prefix token, input 3x16x16
site         where                    layout  dim
patch_embed  patch_embed              BNC     24
block 0      blocks.0                 BNC     24
  attn       blocks.0.attn            BNC     24
  mlp        blocks.0.mlp             BNC     24
  norm1      blocks.0.norm1           BNC     24
  norm2      blocks.0.norm2           BNC     24
  mid        input of blocks.0.norm2  BNC     24
block 1      blocks.1                 BNC     24
  attn       blocks.1.attn            BNC     24
  mlp        blocks.1.mlp             BNC     24
  norm1      blocks.1.norm1           BNC     24
  norm2      blocks.1.norm2           BNC     24
  mid        input of blocks.1.norm2  BNC     24
norm         norm                     BNC     24
head         head                     BNC     24"""


def plain(**options: object) -> nn.Module:
    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 3}
    return timm.create_model("vit_tiny_patch16_224", **{**shape, **options})


def test_table_of_a_plain_vit() -> None:
    assert str(petune.find_sites(plain())) == TABLE


def test_missing_sites_are_dashes_in_the_table() -> None:
    lines = str(petune.find_sites(timm.create_model("test_resnet", num_classes=3))).splitlines()
    assert lines[0] == "ResNet: 0 blocks, width 0, grid ?, 0 prefix tokens, input 3x160x160"
    assert lines[2].split() == ["patch_embed", "-", "-", "-"]


def test_a_missing_site_is_named_in_the_error() -> None:
    block = petune.find_sites(timm.create_model("botnet26t_256", num_classes=3)).blocks[0]
    with pytest.raises(SiteNotFound, match=r"block 0 \(stages.2.1\) of ByobNet has no site 'mid'.*; it has: block"):
        print(block.mid)


def test_a_model_without_attention() -> None:
    model = timm.create_model("test_resnet", num_classes=3)
    with pytest.raises(SiteNotFound, match=r"ResNet has no attention block .*no tokens attend .*Use linear or full"):
        petune.attach(model, "adaptformer")
    assert petune.attach(model, "linear").counts.tuned == 0


def test_a_model_without_a_classifier() -> None:
    with pytest.raises(SiteNotFound, match="VisionTransformer has no classifier"):
        petune.attach(plain(num_classes=0), "linear")


def test_a_backbone_without_a_classifier_inside_a_model_with_one() -> None:
    model = nn.Sequential(plain(num_classes=0), nn.Linear(24, 7))
    assert petune.find_sites(model).head.path == "1"
    assert petune.attach(model, "linear").counts.head == 24 * 7 + 7


def test_input_size_is_needed_if_the_model_does_not_tell() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(AttachError, match=r"does not tell its image size. Pass input_size="):
        petune.find_sites(model)
    assert petune.find_sites(model, input_size=(3, 8, 8)).head.path == "3"
    with pytest.raises(AttachError, match="fails on a 5x8x8 image"):
        petune.find_sites(model, input_size=(5, 8, 8))


def test_the_size_in_a_models_config_goes_before_that_of_a_part() -> None:
    """The patch embedding may have the size of its pretraining (ViTDet, SAM 3 of transformers)."""
    model: Any = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.Flatten(), nn.Linear(64, 2))
    model[0].image_size = 8
    model.config = SimpleNamespace(image_size=16)
    assert petune.find_sites(model).input_size == (3, 16, 16)
    model.image_size = (16, 16)
    model.config.image_size = 32
    assert petune.find_sites(model).input_size == (3, 16, 16)


def test_the_first_convolution_need_not_see_the_image() -> None:
    assert petune.find_sites(timm.create_model("tresnet_m")).input_size == (3, 224, 224)


def test_weights_are_not_copied() -> None:
    """All forwards see meta tensors."""
    model = timm.create_model("vit_base_patch16_224", num_classes=3, depth=1)
    devices: list[str] = []
    model.blocks[0].register_forward_hook(lambda module, args, output: devices.append(output.device.type))
    assert len(petune.find_sites(model).blocks) == 1
    assert {*devices} == {"meta"}


@pytest.mark.parametrize("name", ["coat_lite_tiny", "vit_tiny_patch16_224"])
def test_the_model_is_not_changed(name: str) -> None:
    """CoaT shares modules between blocks: each must get its own tensor back."""
    model = timm.create_model(name, num_classes=3).train()
    model.head.weight.requires_grad_(False)
    before = {n: (id(p), p.requires_grad, p.device.type) for n, p in model.named_parameters(remove_duplicate=False)}
    random = torch.get_rng_state()
    petune.find_sites(model)
    after = {n: (id(p), p.requires_grad, p.device.type) for n, p in model.named_parameters(remove_duplicate=False)}
    assert after == before
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("name", ["gcresnext26ts", "test_resnet", "skresnet18"])
def test_a_gate_is_not_attention(name: str) -> None:
    assert petune.find_sites(timm.create_model(name)).blocks == ()


class Around(nn.Module):
    """A backbone without a classifier, and two layers on its features."""

    image_size = 16

    def __init__(self, returns: str) -> None:
        super().__init__()
        self.body, self.head, self.proj = plain(num_classes=0), nn.Linear(24, 3), nn.Linear(24, 8)
        self.returns = returns

    def forward(self, x: torch.Tensor) -> object:
        z = self.body(x)
        if self.returns == "log_softmax":
            logits = self.head(z).log_softmax(-1)
            self.proj(z)
            return logits
        if self.returns == "embedding first":
            return {"embedding": self.proj(z), "logits": self.head(z)}
        logits, embedding = self.head(z), self.proj(z)
        return (logits, embedding) if self.returns == "tuple" else {"logits": logits, "embedding": embedding}


@pytest.mark.parametrize("returns", ["tuple", "dict", "embedding first", "log_softmax"])
def test_the_classifier_is_the_layer_that_makes_the_logits(returns: str) -> None:
    model = Around(returns).eval()
    att = petune.attach(model, "lora")
    heads = {"head.weight", "head.bias"}  # and every other layer that makes a row for each image that is returned
    assert set(att.head) == heads | (set() if returns == "log_softmax" else {"proj.weight", "proj.bias"})
    att.merge()


def test_a_classifier_followed_by_another_layer_is_not_the_head() -> None:
    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.out = plain(num_classes=10), nn.Linear(10, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.body(x))

    class Wrapped(Stacked):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x)

    heads = [petune.find_sites(model, (3, 16, 16)).head for model in (Stacked(), Wrapped())]
    assert [head.path for head in heads] == ["out", "body.head"]


def test_no_layer_with_as_many_outputs_as_logits_means_no_classifier() -> None:
    class Pairs(Around):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            z = self.body(x)
            return torch.cat([self.head(z), self.proj(z)], -1)

    model = Pairs("")
    assert "head" not in petune.find_sites(model).parts
    with pytest.raises(SiteNotFound, match="has no classifier"):
        petune.attach(model, "linear")
