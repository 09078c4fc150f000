"""Adapters in models whose norms, or residual stream, are float32 and whose matrices are bfloat16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import petune
from tests.tiny import tiny


class Float32Norm(nn.LayerNorm):
    """Returns the dtype that it gets, as timm's LayerNormFp32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.float()).to(x.dtype)


class OfBfloat16(nn.Module):
    """A layer of bfloat16 in a stream of float32."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer.bfloat16()

    def forward(self, x: torch.Tensor, **options: Any) -> torch.Tensor:
        y: torch.Tensor = self.layer(x.bfloat16()).float()
        return y


def with_float32_norms() -> nn.Module:
    model = tiny()
    for block in model.blocks:
        block.norm1, block.norm2 = Float32Norm(24), Float32Norm(24)
    model.bfloat16()
    for block in model.blocks:
        block.norm1.float(), block.norm2.float()
    return model


def with_float32_stream() -> nn.Module:
    model = tiny()
    for block in model.blocks:
        block.attn, block.mlp = OfBfloat16(block.attn), OfBfloat16(block.mlp)
    return model


@pytest.mark.parametrize("build", [with_float32_norms, with_float32_stream])
def test_adapters_compute_in_their_own_dtype_and_return_that_of_the_stream(build: Any) -> None:
    for method in ("adaptformer", "houlsby", "vpt", "lst", "repadapter"):
        model = build()
        x = torch.randn(2, 3, 16, 16, dtype=next(model.parameters()).dtype)
        before = model(x)
        att = petune.attach(model, method)
        assert model(x).dtype == before.dtype
        assert method == "vpt" or torch.equal(model(x), before)
        model(x).float().square().mean().backward()
        att.check_gradients()
