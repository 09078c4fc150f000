"""The grid of tokens in models whose patches a linear layer makes, or whose images share one row of tokens."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import petune
from petune.sites.logits import logits_of
from tests.tiny import randomised

SQUARE, WIDE, HIGH = (96, 96), (64, 144), (144, 64)  # 36 patches of 16 x 16 pixels each


def image(rows: int, columns: int) -> Tensor:
    return torch.randn(2, 3, rows, columns, generator=torch.Generator().manual_seed(1))


def timm_model(name: str) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, embed_dim=48, depth=2, num_heads=2, num_classes=3).eval()


def attached(name: str, size: tuple[int, int] = SQUARE) -> petune.Attachment:
    return petune.attach(timm_model(name), "convpass", train_head=False, input_size=(3, *size))


@pytest.mark.parametrize("name", ["gemma4_vit_167m", "naflexvit_base_patch16_gap"])
@torch.no_grad()
def test_another_shape_with_as_many_patches_has_its_own_grid(name: str) -> None:
    att = randomised(attached(name))
    for size in (WIDE, HIGH, SQUARE, (96, 48)):
        own = attached(name, size)
        for key, p in own.tuned.items():
            p.copy_(att.tuned[key])
        torch.testing.assert_close(att.model(image(*size)), own.model(image(*size)))


def test_a_forward_whose_images_are_not_seen_is_an_error() -> None:
    model: Any = attached("naflexvit_base_patch16_gap").model
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(9), indexing="ij")
    packed = {
        "patches": torch.randn(1, 36, 16 * 16 * 3),
        "patch_coord": torch.stack([rows, columns], -1).reshape(1, 36, 2),
        "patch_valid": torch.ones(1, 36, dtype=torch.bool),
    }
    with pytest.raises(petune.AttachError, match="call the model itself"):
        model(packed)
    with pytest.raises(petune.AttachError, match="call the model itself"):
        model.forward_features(image(*SQUARE))
    model(image(*SQUARE))


def test_a_repeated_block_of_an_ambiguous_grid_is_an_error() -> None:
    model: Any = attached("naflexvit_base_patch16_gap").model
    model.set_grad_checkpointing()
    model.train()
    model(image(96, 48)).sum().backward()
    with pytest.raises(petune.AttachError, match="checkpointing"):
        model(image(*WIDE)).sum().backward()


def pixtral() -> nn.Module:
    from transformers import PixtralVisionConfig, PixtralVisionModel

    torch.manual_seed(0)
    config = PixtralVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    return PixtralVisionModel(config).eval()


@torch.no_grad()
def test_a_model_that_packs_a_batch_into_one_row_works_or_is_refused() -> None:
    for method in ("convpass", "vpt"):
        with pytest.raises(petune.AttachError, match="one row of tokens"):
            petune.attach(pixtral(), method, train_head=False)
    x = image(32, 32)
    for method in ("adaptformer", "lora", "lst", "ssf"):
        model = pixtral()
        plain = logits_of(model(x))
        randomised(petune.attach(model, method, train_head=False))
        both = logits_of(model(x))
        assert not torch.allclose(both, plain, atol=1e-3)
        torch.testing.assert_close(both, torch.cat([logits_of(model(x[i : i + 1])) for i in range(2)], 1))
