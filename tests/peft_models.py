"""A tiny ViT for PEFT's types, and adapters with random values."""

from __future__ import annotations

import torch
from torch import nn

import petune
from petune.plugin_dev.tiny_models import tiny_timm

X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def model() -> nn.Module:
    return tiny_timm(embed_dim=32)


def randomized(att: petune.Attachment) -> petune.Attachment:
    torch.manual_seed(2)
    with torch.no_grad():
        for p in att.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    return att


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(X)
