"""Prompts in a model that takes images of any size, at other sizes than that of attaching."""

from __future__ import annotations

import pytest
import timm
import torch

import petune


@torch.no_grad()
@pytest.mark.exhaustive
def test_prompts_fit_gemma4_at_other_sizes_than_that_of_attaching() -> None:
    """The model pads its tables of rotations and its masks for each call."""
    torch.manual_seed(0)
    model = timm.create_model("gemma4_vit_167m", embed_dim=48, depth=2, num_heads=2, num_classes=3).eval()
    images = [torch.randn(2, 3, *size) for size in ((96, 96), (192, 96), (48, 144))]
    plain = [model(x) for x in images]
    att = petune.attach(model, "vpt", train_head=False)
    for x, before in zip(images, plain, strict=True):
        assert model(x).shape == before.shape
        torch.testing.assert_close(model(x)[:1], model(x[:1]))
        with att.disabled():
            assert torch.equal(model(x), before)
