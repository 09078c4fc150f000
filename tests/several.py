"""A tiny ViT with a classifier of its own, for tests of several adapters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from petune.plugin_dev.tiny_models import tiny_timm

X = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def model(num_classes: int = 3) -> nn.Module:
    built = tiny_timm()
    built.reset_classifier(num_classes)
    torch.manual_seed(num_classes)
    nn.init.normal_(built.head.weight)
    nn.init.normal_(built.head.bias)
    return built.eval()


@torch.no_grad()
def logits(of: nn.Module, x: Tensor = X) -> Tensor:
    return of.eval()(x)
