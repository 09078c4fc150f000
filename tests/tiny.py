"""The small ViT that tests attach to, and what most of them do with it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import timm
import torch
from torch import nn

import petune

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def tiny(seed: int = 0, **options: object) -> nn.Module:
    """A timm ViT of 2 blocks, width 24 and 5 classes for 16×16 images; its head is not zero, as timm starts it."""
    torch.manual_seed(seed)
    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", **{**shape, **options}).eval()
    nn.init.normal_(model.head.weight)
    return model


def randomised(att: petune.Attachment) -> petune.Attachment:
    """The attachment with tuned values far from their start, so that what they do is seen."""
    for p in att.tuned.values():
        nn.init.normal_(p, std=0.2)
    return att


def trained(att: petune.Attachment) -> petune.Attachment:
    """The attachment after two steps, in eval mode."""
    optimizer = torch.optim.SGD(att.parameters(), lr=0.1)
    att.train()
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(att.model(X), torch.tensor([0, 1])).backward()
        optimizer.step()
    att.model.eval()
    return att


def module_beside(test: str, name: str) -> ModuleType:
    """The module `name` in the directory of a test, importable by that name from then on."""
    spec = importlib.util.spec_from_file_location(name, Path(test).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
