"""Tiny classifiers with random weights, of the libraries that are installed. The contract is checked on them."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn


def tiny_models() -> dict[str, Callable[[], nn.Module]]:
    """Return the builders of the installed libraries, by name; timm first."""
    return {name: build for name, build in BUILDERS.items() if find_spec(name) is not None}


def tiny_timm(**options: Any) -> nn.Module:
    """Build timm's ViT: two blocks, images of 16 pixels, a class token, three classes."""
    import timm

    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 3}
    return _randomized(lambda: timm.create_model("vit_tiny_patch16_224", **{**shape, **options}))


def tiny_torchvision() -> nn.Module:
    """Build torchvision's ViT: fused attention whose weights are read without a call."""
    from torchvision.models import VisionTransformer

    return _randomized(lambda: VisionTransformer(16, 4, 2, 2, 24, 48, num_classes=3))


def tiny_transformers() -> nn.Module:
    """Build Hugging Face's ViT: separate q, k and v, an MLP of two sibling modules, logits in an output object."""
    from transformers import ViTConfig, ViTForImageClassification

    make: Any = ViTConfig  # its dataclass does not list what its base class takes
    sizes = {"image_size": 16, "patch_size": 4, "num_labels": 3, "num_hidden_layers": 2}
    config = make(hidden_size=24, num_attention_heads=2, intermediate_size=48, **sizes)
    return _randomized(lambda: ViTForImageClassification(config))


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "timm": tiny_timm,
    "torchvision": tiny_torchvision,
    "transformers": tiny_transformers,
}


def _randomized(build: Callable[[], Any]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = build()
        for name, p in model.named_parameters():  # heads and gates often start at zero, which would hide a dead tuner
            nn.init.normal_(p, mean=1.0 if p.ndim == 1 and name.endswith("weight") else 0.0, std=0.1)
    return model.eval()
