"""Give a model a fresh classifier, the same for every method of a comparison."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn

from petune.backbones.input_size import backbone_sites
from petune.base.errors import ConfigError
from petune.sites.named_heads import classifiers_of

HeadKind = Literal["linear", "bn_linear"]


def set_head(model: nn.Module, num_classes: int, kind: HeadKind = "linear", seed: int = 0) -> None:
    """Replace the classifier: weights from trunc_normal(std=0.01), zero bias.

    Args:
        model: Changed in place.
        num_classes: Outputs of the classifier.
        kind: `bn_linear` puts a BatchNorm without affine parameters before the linear layer (as AdaptFormer's authors).
        seed: Seed of the weights.

    Raises:
        ConfigError: The classifier does not end with a linear layer.
    """
    if any(linear.out_features != num_classes for linear in _classifiers(model).values()):
        _resize(model, num_classes)
    for path, linear in _classifiers(model).items():  # distilled models have two
        generator = torch.Generator().manual_seed(seed)
        nn.init.trunc_normal_(linear.weight, std=0.01, generator=generator)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
        if kind == "bn_linear":
            norm = nn.BatchNorm1d(linear.in_features, affine=False, eps=1e-6)
            model.set_submodule(path, nn.Sequential(norm, linear))


def _classifiers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear classifiers by path: those that timm names, otherwise those that are found."""
    heads: Iterable[nn.Module] | None = classifiers_of(model)  # CrossViT has one per scale
    if heads is None:
        site = backbone_sites(model).parts.get("head")
        heads = site.modules if site is not None else ()
    layers = {id(_last_linear(head)) for head in heads}
    return {path: module for path, module in model.named_modules() if id(module) in layers}


def _last_linear(head: nn.Module) -> nn.Linear | None:
    """Return the linear layer at the end of a classifier, or None if the classifier was removed."""
    if isinstance(head, nn.Identity):
        return None
    layers = [module for module in head.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ConfigError(
            f"the classifier is a {type(head).__name__} without a linear layer, so it cannot be replaced. Build the "
            "model yourself and call petune.attach(model, method)"
        )
    return layers[-1]


def _resize(model: nn.Module, num_classes: int) -> None:
    if hasattr(model, "reset_classifier"):
        model.reset_classifier(num_classes)  # type: ignore[operator]
        return
    for path, linear in _classifiers(model).items():
        bias = linear.bias is not None
        model.set_submodule(path, nn.Linear(linear.in_features, num_classes, bias, device=linear.weight.device))
