"""All models of the survey, by the name of their family."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from survey.other_library_models import TORCHVISION, TRANSFORMERS, build_torchvision, build_transformers
from survey.timm_models import TIMM
from survey.transformers_classes import CLASSES, build_by_class
from survey.transformers_dense import DENSE
from survey.transformers_further import FURTHER
from survey.transformers_reading import READING
from survey.transformers_towers import TOWERS

TABLES = (CLASSES, FURTHER, TOWERS, DENSE, READING)
BY_CLASS = {f"transformers {family}": entry for table in TABLES for family, entry in table.items()}
FAMILIES = {
    **{family: name for table in (TIMM, TORCHVISION, TRANSFORMERS) for family, (name, _) in table.items()},
    **{family: entry.model.rpartition(".")[2] for family, entry in BY_CLASS.items()},
}
"""The model that represents each family."""


def build(family: str) -> nn.Module:
    """Return a small model of the family with three classes and random weights, always the same."""
    torch.manual_seed(0)
    if family in TORCHVISION:
        return build_torchvision(family)
    if family in BY_CLASS:
        return build_by_class(BY_CLASS[family])
    return build_transformers(family) if family in TRANSFORMERS else _timm(family)


def example_of(family: str) -> Any:
    """Return what the family's model takes; None for one image or clip of a size that the model tells."""
    entry = BY_CLASS.get(family)
    torch.manual_seed(0)
    return entry.example() if entry is not None and entry.example is not None else None


def _timm(family: str) -> nn.Module:
    import timm

    name, options = TIMM[family]
    arguments = {k: v for k, v in options.items() if k != "input_size"}
    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=3, **arguments)
    if "input_size" in options:  # a model that takes any size has no argument img_size
        model.pretrained_cfg = {**model.pretrained_cfg, "input_size": options["input_size"]}
    return model
