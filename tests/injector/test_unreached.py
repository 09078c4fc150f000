"""Layers whose output nobody reads are named, and models whose output does not depend on the image."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import petune
from petune.base.errors import DeadSite
from tests.tiny import tiny


class AttentionAlone(nn.Module):
    """A block that computes its MLP, and returns the stream before it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = inner.norm1, inner.attn, inner.norm2, inner.mlp
        self.is_last = False

    def forward(self, x: Tensor, **options: object) -> Tensor:
        x = x + self.attn(self.norm1(x))
        y = x + self.mlp(self.norm2(x))
        return x + 0 if self.is_last else y


def half_read() -> nn.Module:
    """A ViT whose last block has an MLP that nothing reads."""
    model = tiny()
    model.blocks = nn.Sequential(*map(AttentionAlone, model.blocks))
    model.blocks[-1].is_last = True
    return model.eval()


@pytest.mark.parametrize("method", ["lora", "partial"])
def test_an_mlp_that_nothing_reads_is_named(method: str) -> None:
    with pytest.warns(UserWarning, match=rf"{method} also trains blocks\.1\.mlp of .* learns nothing"):
        petune.attach(half_read(), method)
    with pytest.warns(UserWarning, match=r"blocks\.1\.mlp"):
        petune.attach(half_read(), "lora", blocks=[1])


def test_a_refusal_names_the_mlp_and_not_its_block() -> None:
    with pytest.raises(DeadSite, match=r"nothing at blocks\.1\.mlp of .*blocks=\[0\].*lora"):
        petune.attach(half_read(), "houlsby")


class Blind(nn.Module):
    """A ViT that drops its patches and keeps the class token."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = tiny()

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.vit._pos_embed(self.vit.patch_embed(x))
        tokens = torch.where(torch.arange(17)[:, None] > 0, 0.0, 1.0) * tokens
        return self.vit.head(self.vit.norm(self.vit.blocks(tokens))[:, 0])


def test_a_model_that_ignores_its_images_is_told() -> None:
    model = Blind().eval()
    with pytest.warns(UserWarning, match="same for two different images"):
        petune.attach(model, "lora", input_size=(3, 16, 16))


def test_logits_of_zero_from_a_new_head_are_no_reason() -> None:
    model = tiny()
    nn.init.zeros_(model.head.weight)
    petune.attach(model, "adaptformer")
