"""The image size that a model expects, read from the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from petune.base.errors import AttachError

FRAMES = ("num_frames", "frames_per_clip")
"""Names of the number of frames, in configs of transformers and as attribute of a model."""


def input_sizes_of(model: nn.Module) -> list[tuple[int, ...]]:
    """Return candidates for (channels, height, width): the size the model was built with, else its weights' size.

    Channels are those of the first convolution, then three, because that convolution may not see the image itself. A
    model whose config has a number of frames is tried on (frames, channels, height, width) first.

    Raises:
        AttachError: The model does not tell its size.
    """
    images = image_sizes_of(model)
    frames = frames_of(model)
    return [*((frames, *image) for image in images if frames is not None), *images]


def image_sizes_of(model: nn.Module) -> list[tuple[int, ...]]:
    """Return candidates for (channels, height, width), without frames; see `input_sizes_of`."""
    height, width = _size(model)
    return [(channels, height, width) for channels in dict.fromkeys((channels_of(model), 3))]


def frames_of(model: nn.Module) -> int | None:
    """Return the number of frames that a model, or its config (transformers), has; None for a model of images."""
    owners: tuple[Any, ...] = (model, getattr(model, "config", None))
    frames = next((getattr(owner, name) for owner in owners for name in FRAMES if getattr(owner, name, None)), None)
    return frames if isinstance(frames, int) and not isinstance(frames, bool) else None


def _size(model: nn.Module) -> tuple[int, int]:
    for size in _stated_sizes(model):
        if size is not None:
            return size
    raise AttachError(
        f"{type(model).__name__} does not tell its image size. "
        "Pass input_size=(channels, height, width), for example input_size=(3, 224, 224); or, for a model that takes "
        "anything else than images, example= with what it takes"
    )


def _stated_sizes(model: nn.Module) -> Iterator[tuple[int, int] | None]:
    """Yield sizes, the most reliable first: a part, such as a patch embedding, may have that of its pretraining."""
    yield _size_among(model, "img_size", "image_size")
    yield _size_among(getattr(model, "config", None), "image_size", "crop_size")
    for module in model.modules():  # timm's patch_embed, torchvision's VisionTransformer, many hand-written models
        yield _size_among(module, "img_size", "image_size")
    for module in model.modules():
        config = getattr(module, "pretrained_cfg", None) or getattr(module, "default_cfg", None)
        if isinstance(config, dict) and config.get("input_size"):
            yield int(config["input_size"][1]), int(config["input_size"][2])
        yield _size_among(getattr(module, "config", None), "image_size", "crop_size")


def _size_among(owner: Any, *names: str) -> tuple[int, int] | None:
    return next((size for name in names if (size := _pair(getattr(owner, name, None))) is not None), None)


def channels_of(model: nn.Module) -> int:
    """Return the input channels of the first convolution; 3 if there is none."""
    convolutions = (m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Conv3d))
    return next((conv.in_channels for conv in convolutions), 3)


def _pair(value: Any) -> tuple[int, int] | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return value, value
    if isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(v, int) for v in value):
        return int(value[0]), int(value[1])
    return None
