"""Build torchvision's models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from petune.backbones.timm_models import BUILD_ERRORS, describe, set_statistics
from petune.base.errors import ConfigError, UnknownName
from petune.base.hub import HubFile, check_weights_available

IMAGE_SIZE = 224  # of the pretrained models; those without position embeddings do not record it
NUM_FRAMES = 16
"""Frames of a clip for video models; MViT was made for them, and the others take any number."""


def build_torchvision(name: str, num_classes: int, options: Mapping[str, Any], *, pretrained: bool) -> nn.Module:
    """Build a model of torchvision.

    Args:
        name: Such as `vit_b_16`; or a video model such as `swin3d_t`, which gets an attribute `num_frames`.
        num_classes: Outputs of the classifier; pretrained weights come with their own.
        options: Arguments of the model; `image_size` and `num_frames` of those that have such an argument.
        pretrained: Load the default weights.

    Raises:
        UnknownName: torchvision has no such model.
        WeightsUnavailable: The weights are neither cached nor downloadable.
        ConfigError: The model does not accept these options.
    """
    from torchvision import models

    videos = models.list_models(module=models.video)
    known = [*models.list_models(module=models), *videos]
    if name not in known:
        raise UnknownName("torchvision model", name, known, "torchvision.models.list_models() lists them")
    arguments = dict(options)
    num_frames = arguments.pop("num_frames", NUM_FRAMES)
    if name in videos:
        _check_video_size(name, arguments.pop("image_size", IMAGE_SIZE), num_frames)
    elif "vit" not in name:
        arguments.pop("image_size", None)  # a convolutional model takes any size
    if pretrained:
        weights = models.get_model_weights(name).DEFAULT
        check_weights_available(f"torchvision:{name}", HubFile("", url=weights.url))
    else:
        weights = None
        arguments["num_classes"] = num_classes
    try:
        model: nn.Module = models.get_model(name, weights=weights, **arguments)
    except BUILD_ERRORS as error:
        raise ConfigError(f"cannot build torchvision:{describe(name, options)}: {error}") from error
    if weights is not None:
        preset = weights.transforms()
        set_statistics(model, preset.mean, preset.std)
    if name in videos:
        model.num_frames = num_frames
    return model


def _check_video_size(name: str, image_size: int, num_frames: int) -> None:
    """Check the size of clips for a model with position embeddings, whose builder has no argument for it.

    Raises:
        ConfigError: It is another one.
    """
    if name.startswith("mvit") and (image_size, num_frames) != (IMAGE_SIZE, NUM_FRAMES):
        raise ConfigError(
            f"torchvision:{name} takes clips of {NUM_FRAMES} frames of {IMAGE_SIZE}×{IMAGE_SIZE} only, not of "
            f"{num_frames} frames of {image_size}×{image_size}: torchvision cannot resize its position embeddings"
        )
