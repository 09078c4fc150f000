"""Build torchvision's models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from petune.backbones.timm_models import describe, set_statistics
from petune.base.errors import ConfigError, UnknownName
from petune.base.hub import HubFile, check_weights_available

IMAGE_SIZE = 224  # of the pretrained models; those without position embeddings do not record it


def build_torchvision(name: str, num_classes: int, options: Mapping[str, Any], *, pretrained: bool) -> nn.Module:
    """Build a model of torchvision.

    Args:
        name: Such as `vit_b_16`.
        num_classes: Outputs of the classifier; pretrained weights come with their own.
        options: Arguments of the model.
        pretrained: Load the default weights.

    Raises:
        UnknownName: torchvision has no such model.
        WeightsUnavailable: The weights are neither cached nor downloadable.
        ConfigError: The model does not accept these options.
    """
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise UnknownName("torchvision model", name, known, "torchvision.models.list_models() lists them")
    arguments = dict(options)
    if "vit" not in name:
        arguments.pop("image_size", None)  # a convolutional model takes any size
    if pretrained:
        weights = models.get_model_weights(name).DEFAULT
        check_weights_available(f"torchvision:{name}", HubFile("", url=weights.url))
    else:
        weights = None
        arguments["num_classes"] = num_classes
    try:
        model: nn.Module = models.get_model(name, weights=weights, **arguments)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise ConfigError(f"cannot build torchvision:{describe(name, options)}: {error}") from error
    if weights is not None:
        preset = weights.transforms()
        set_statistics(model, preset.mean, preset.std)
    return model
