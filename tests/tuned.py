"""A tiny ViT with a method whose parameters are random."""

from __future__ import annotations

import torch

import petune
from petune.plugin_dev.tiny_models import tiny_timm

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
D = 24


def attached(method: str, **options: object) -> petune.Attachment:
    """Attach a method to a tiny ViT with LayerScale, with random tuned parameters."""
    torch.manual_seed(0)
    att = petune.attach(tiny_timm(init_values=0.3), method, **options)
    with torch.no_grad():
        for p in att.tuned.values():
            p.add_(torch.randn_like(p), alpha=0.1)
    return att
