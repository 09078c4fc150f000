"""Every model of the survey by its family's name."""

from __future__ import annotations

import torch
from torch import nn

from survey.timm_models import TIMM

FAMILIES = {family: name for family, (name, _) in TIMM.items()}
"""The model that stands for each family."""


def build(family: str) -> nn.Module:
    """A small model of the family with three classes and random weights."""
    import timm

    name, options = TIMM[family]
    size = options.get("input_size")
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(
        name, pretrained=False, num_classes=3, **{k: v for k, v in options.items() if k != "input_size"}
    )
    if size is not None:  # a model that takes any size, and so has no img_size to build it with
        model.pretrained_cfg = {**model.pretrained_cfg, "input_size": size}
    return model
