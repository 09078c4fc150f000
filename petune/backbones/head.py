"""Give a model a fresh classifier, the same for every method of a comparison."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn

from petune.backbones.input_size import backbone_sites
from petune.base.errors import ConfigError
from petune.sites.heads_by_library import classifiers_of
from petune.sites.logits import synthetic_logits
from petune.sites.predictors import have_twins
from petune.sites.recorder import record

HeadKind = Literal["linear", "bn_linear"]


def set_head(model: nn.Module, num_classes: int, kind: HeadKind = "linear", seed: int = 0) -> None:
    """Replace the classifier: weights from trunc_normal(std=0.01), zero bias.

    Args:
        model: Changed in place.
        num_classes: Outputs of the classifier.
        kind: `bn_linear` puts a BatchNorm without affine parameters before the linear layer (as AdaptFormer's authors).
        seed: Seed of the weights.

    Raises:
        ConfigError: The classifier does not end with a linear layer, or BatchNorm cannot be before it.
    """
    if any(linear.out_features != num_classes for linear in _classifiers(model).values()):
        _resize(model, num_classes)
    classifiers = _classifiers(model)  # distilled models have two
    if kind == "bn_linear":
        _check_features(model, classifiers.values())
    for path, linear in classifiers.items():
        generator = torch.Generator().manual_seed(seed)
        if linear.weight.is_meta and torch.get_default_device().type != "meta":
            linear.to_empty(device="cpu")  # of a model that gets its weights from a file
        nn.init.trunc_normal_(linear.weight, std=0.01, generator=generator)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
        if kind == "bn_linear":
            norm = nn.BatchNorm1d(linear.in_features, affine=False, eps=1e-6)
            model.set_submodule(path, nn.Sequential(norm, linear))


def _check_features(model: nn.Module, classifiers: Iterable[nn.Module]) -> None:
    """Check that classifiers get one vector of features for each sample, (B, D), as BatchNorm needs it.

    Raises:
        ConfigError: One of them gets more dimensions, such as tokens.
    """
    inputs = {call.module: call.input for call in record(model, backbone_sites(model).input_spec).calls}
    for classifier in classifiers:
        x = inputs.get(classifier)
        if x is not None and x.ndim != 2:
            raise ConfigError(
                f"head='bn_linear' needs a classifier that gets a vector for each sample, but that of "
                f"{type(model).__name__} gets {x.ndim} dimensions. Use head='linear'"
            )


def _classifiers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear classifiers by path: those that timm names, otherwise those that are found."""
    heads: Iterable[nn.Module] | None = classifiers_of(model)  # CrossViT has one per scale
    if heads is None or have_twins(model, heads):  # VOLO names one of two
        sites = backbone_sites(model)
        site = sites.parts.get("head")
        heads = site.modules if site is not None else ()
        if len(heads) > 1:  # with a pooling before the classifier (V-JEPA 2)
            heads = _with_logits(heads, synthetic_logits(model, sites, 1).shape[-1])
    layers = {id(_last_linear(head)) for head in heads}
    return {path: module for path, module in model.named_modules() if id(module) in layers}


def _with_logits(heads: Iterable[nn.Module], num_logits: int) -> list[nn.Module]:
    """Return the heads that have as many outputs as the model has logits; single layers, if there are any.

    A norm before the classifier is among the heads where a checkpoint lacks it (VideoMAE before fine-tuning).
    """
    heads = [head for head in heads if any(isinstance(m, nn.Linear) for m in head.modules())]
    ending = [head for head in heads if (layer := _last_linear(head)) and layer.out_features == num_logits]
    return [head for head in ending if isinstance(head, nn.Linear)] or ending


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
