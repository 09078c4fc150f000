"""Modules that several blocks, or places of one block, share: an adapter acts where it is put, or is refused."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

import petune

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def vit() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3, embed_dim=24, num_heads=2, num_classes=3
    )
    return model.eval()


def vit_with_one_mlp() -> nn.Module:
    model = vit()
    for block in model.blocks:  # type: ignore[union-attr]
        block.mlp = model.blocks[0].mlp  # type: ignore[index,union-attr]
    return model


def vit_with_one_norm_in_each_block() -> nn.Module:
    model = vit()
    for block in model.blocks:  # type: ignore[union-attr]
        block.norm2 = block.norm1
    return model


@pytest.mark.parametrize("blocks", [[0], [2], [0, 1]])
@pytest.mark.parametrize("method", ["pfeiffer", "houlsby", "repadapter", "lora", "ssf", "fact"])
def test_an_mlp_of_chosen_and_of_other_blocks_is_not_changed(method: str, blocks: list[int]) -> None:
    model = vit_with_one_mlp()
    before = [*model.state_dict()]
    with pytest.raises(petune.AttachError, match="left out"):
        petune.attach(model, method, blocks=blocks)
    assert [*model.state_dict()] == before


@pytest.mark.parametrize("method", ["adaptformer", "lora:targets=[qkv]"])
def test_methods_that_leave_a_shared_mlp_alone_choose_blocks(method: str) -> None:
    model = vit_with_one_mlp()
    att = petune.attach(model, method, blocks=[2])
    assert all(key.startswith("blocks.2.") for key in att.tuned)


def test_a_norm_that_a_block_calls_twice_is_scaled_once() -> None:
    model = vit_with_one_norm_in_each_block()
    own = petune.attach(vit(), "ssf").counts.tuned
    att = petune.attach(model, "ssf")
    assert att.counts.tuned == own - 3 * 2 * 24


class ScaleSecondNorm(petune.Tuner[petune.TunerConfig]):
    def attach(self, edit: petune.Edit) -> None:
        for block in edit.sites.blocks:
            edit.after(block.norm2, nn.Linear(24, 24))

    def num_parameters(self, sites: petune.Sites) -> int:
        return len(sites.blocks) * 25 * 24


@pytest.mark.parametrize("method", [ScaleSecondNorm(), "pfeiffer:position=pre", "mona"])
def test_an_adapter_for_one_call_of_a_norm_is_refused(method: str | petune.Tuner[petune.TunerConfig]) -> None:
    model = vit_with_one_norm_in_each_block()
    before: Tensor = model(X)
    with pytest.raises(petune.AttachError, match="norm1"):
        petune.attach(model, method)
    assert torch.equal(model(X), before)
