"""Blocks that sample what they attend to, and blocks between two stages, are found as the others are."""

from __future__ import annotations

from dataclasses import replace
from types import MethodType

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn
from torchvision.models.video.mvit import MSBlockConfig, MViT

import petune
from tests.sampling import sampled


def deformable_detr() -> nn.Module:
    resnet = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
    detr = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "num_queries": 10, "num_labels": 3}
    detr |= {f"{part}_attention_heads": 4 for part in ("encoder", "decoder")}
    detr |= {f"{part}_ffn_dim": 64 for part in ("encoder", "decoder")}
    backbone = transformers.ResNetConfig(**resnet, out_features=["stage2", "stage3", "stage4"])
    own = {"use_timm_backbone": False, "backbone": None, "backbone_config": backbone}
    return transformers.DeformableDetrForObjectDetection(transformers.DeformableDetrConfig(**detr, **own))


def test_deformable_attention_is_found() -> None:
    sites = petune.find_sites(deformable_detr(), (3, 128, 128))
    encoder = [block for block in sites.blocks if "encoder.layers" in block.path]
    assert [block.path for block in encoder] == ["model.encoder.layers.0", "model.encoder.layers.1"]
    for block in encoder:
        assert block.attn.path == f"{block.path}.self_attn"
        assert block.mlp.path == f"{block.path}.mlp"
        assert {"mid", "norm1", "norm2"} <= block.parts.keys()
    assert sites.num_prefix_tokens == 0  # the tokens are those of all levels
    assert all("encoder_attn" not in block.parts["mlp"].path for block in sites.blocks if "mlp" in block.parts)


def test_adapters_in_deformable_blocks_take_effect() -> None:
    model = deformable_detr().eval()
    sites = petune.find_sites(model, (3, 128, 128))
    encoder = replace(sites, blocks=sites.blocks[:2])
    att = petune.attach(model, "adaptformer", bottleneck=4, sites=encoder, train_head=False)
    x = torch.randn(2, 3, 128, 128)
    with torch.no_grad():
        before = model(x).logits
        for p in att.tuned.values():
            nn.init.normal_(p, std=0.2)
        assert not torch.allclose(model(x).logits, before, atol=1e-4)


class PostNormMlp(nn.Module):
    """An MLP that holds its residual and the norm after it, as those of OneFormer's decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.norm = nn.Linear(24, 48), nn.Linear(48, 24), nn.LayerNorm(24)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x + self.fc2(self.fc1(x).relu()))
        return y


def test_an_mlp_ends_before_its_own_residual_and_norm() -> None:
    vit = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=3
    )
    for block in vit.blocks:
        block.mlp, block.norm2 = PostNormMlp(), nn.Identity()
        block.forward = MethodType(lambda self, x: self.mlp(self.norm1(x + self.attn(x))), block)
    block = petune.find_sites(vit).blocks[0]
    assert (block.mlp.where, block.mid.where) == ("blocks.0.mlp.fc1 … blocks.0.mlp.fc2", "input of blocks.0.mlp.fc1")


class SelectiveKernel(nn.Module):
    """Weighs branches of a convolution, which is not an attention over tokens, and samples an image elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(3, 8, 3, padding=1) for _ in range(2))
        self.weigh = nn.Linear(8, 16)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        grid = torch.zeros(len(x), 8, 8, 2, dtype=x.dtype, device=x.device)
        x = nn.functional.grid_sample(x, grid, align_corners=False)
        y = torch.stack([branch(x) for branch in self.branches], 1)
        weights = self.weigh(y.sum(1).mean((2, 3))).view(len(x), 2, 8, 1, 1).softmax(1)
        return self.head((y * weights).sum(1).mean((2, 3)))


def test_weighed_branches_are_no_block() -> None:
    assert petune.find_sites(SelectiveKernel(), (3, 8, 8)).blocks == ()


def torchvision_mvit(*, proj_after_attn: bool) -> nn.Module:
    widths, strides = [(16, 32), (32, 32), (32, 64), (64, 64)], [1, 2, 1, 2]
    setting = [
        MSBlockConfig(
            num_heads=2, input_channels=a, output_channels=b, kernel_q=[1, 3, 3] if stride > 1 else [],
            kernel_kv=[1, 3, 3], stride_q=[1, stride, stride] if stride > 1 else [], stride_kv=[1, 2, 2],
        )
        for (a, b), stride in zip(widths, strides, strict=True)
    ]  # fmt: skip
    return MViT(
        spatial_size=(32, 32), temporal_size=2, block_setting=setting, residual_pool=False,
        residual_with_cls_embed=True, rel_pos_embed=False, proj_after_attn=proj_after_attn, num_classes=3,
        patch_embed_kernel=(2, 7, 7), patch_embed_stride=(2, 4, 4), patch_embed_padding=(0, 3, 3),
    )  # fmt: skip


class OneFrame(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.model(torch.stack([x, x], 2))
        return y


@pytest.mark.parametrize("proj_after_attn", [True, False])
def test_blocks_that_change_width_and_stride_are_found(proj_after_attn: bool) -> None:
    model = OneFrame(torchvision_mvit(proj_after_attn=proj_after_attn))
    sites = petune.find_sites(model, (3, 32, 32))
    assert [block.path for block in sites.blocks] == [f"model.blocks.{i}" for i in range(4)]
    assert [block.dim for block in sites.blocks] == [32, 32, 64, 64]
    assert [block.mlp.dim for block in sites.blocks] == [32, 32, 64, 64]
    assert all({"attn", "norm1", "norm2"} <= block.parts.keys() for block in sites.blocks)
    assert sites.num_prefix_tokens == 1


@pytest.mark.parametrize("method", ["pfeiffer", "lora", "bitfit"])
def test_adapters_of_blocks_that_change_the_width_get_gradients(method: str) -> None:
    model = OneFrame(torchvision_mvit(proj_after_attn=False))
    att = petune.attach(model, method, sites=petune.find_sites(model, (3, 32, 32)))
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None for p in att.tuned.values())


@pytest.mark.parametrize("name", sampled(["mvitv2_tiny", "mvitv2_base_cls"], "mvitv2_tiny".__eq__))
def test_a_stage_of_one_token_has_all_its_blocks(name: str) -> None:
    model = timm.create_model(name, img_size=32, num_classes=3)
    blocks = [path for path, m in model.named_modules() if type(m).__name__ == "MultiScaleBlock"]
    assert [block.path for block in petune.find_sites(model, (3, 32, 32)).blocks] == blocks


def test_attention_that_pools_all_tokens_is_still_no_block() -> None:
    options = {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 4}
    model = timm.create_model("vit_base_patch16_siglip_224", num_classes=3, **options)
    assert len(petune.find_sites(model).blocks) == 2
