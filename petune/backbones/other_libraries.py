"""Build backbones of other libraries than timm, or with the user's own function."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from torch import nn

from petune.backbones.names import calls_user_code
from petune.backbones.torchvision_models import IMAGE_SIZE, build_torchvision
from petune.backbones.transformers_models import build_hf
from petune.backbones.user_factory import build_with_factory
from petune.base.errors import AttachError
from petune.sites.input_size import input_sizes_of


def build_other_library(
    name: str, num_classes: int, options: Mapping[str, Any], *, pretrained: bool, stay_in_file: bool = False
) -> nn.Module:
    """Build a model that maps images to logits and has their size as `image_size`.

    Args:
        name: `torchvision:vit_b_16`, `hf:facebook/dinov2-small`, `hf:DIR` with a `config.json`, or `my.package:make`.
        num_classes: Outputs of the classifier, if the builder takes it.
        options: Arguments of the builder, or keys of transformers' config.
        pretrained: Load the weights that belong to the name.
        stay_in_file: See `petune.backbones.from_file.build_from_file`; for transformers.

    Raises:
        UnknownName: There is no such model.
        MissingExtra: transformers is not installed.
        WeightsUnavailable: The weights are not available.
        ConfigError: The builder does not accept these options, or the import fails.
    """
    library, _, model_name = name.partition(":")
    if calls_user_code(name):
        model = build_with_factory(name, num_classes, options)
    elif library == "torchvision":
        model = build_torchvision(model_name, num_classes, options, pretrained=pretrained)
    else:
        model = build_hf(model_name, num_classes, options, pretrained=pretrained, stay_in_file=stay_in_file)
    if "image_size" in options:
        model.image_size = options["image_size"]
    elif library == "torchvision" and not _records_input_size(model):
        model.image_size = IMAGE_SIZE  # type: ignore[assignment]
    return model


def _records_input_size(model: nn.Module) -> bool:
    with contextlib.suppress(AttachError):
        return bool(input_sizes_of(model))
    return False
