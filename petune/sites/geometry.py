"""What size of image a model wants."""

from __future__ import annotations

from typing import Any

from torch import nn

from petune.base.errors import AttachError


def input_sizes_of(model: nn.Module) -> list[tuple[int, int, int]]:
    """(channels, height, width) as the model itself tells: the size it was built with before its weights' size.

    Channels are those of the first convolution, or three where that one does not see the image itself.

    Raises:
        AttachError: The model does not tell.
    """
    height, width = _size(model)
    return [(channels, height, width) for channels in dict.fromkeys((_channels(model), 3))]


def _size(model: nn.Module) -> tuple[int, int]:
    for module in model.modules():  # timm's patch_embed, torchvision's VisionTransformer, many hand-written ones
        for name in ("img_size", "image_size"):
            size = _pair(getattr(module, name, None))
            if size is not None:
                return size
    for module in model.modules():
        told = getattr(module, "pretrained_cfg", None) or getattr(module, "default_cfg", None)
        if isinstance(told, dict) and told.get("input_size"):
            return _three(told["input_size"])
        size = _pair(getattr(getattr(module, "config", None), "image_size", None))
        if size is not None:
            return size
    raise AttachError(
        f"petune runs a model once to see its parts, but {type(model).__name__} does not tell its image size. "
        "Pass input_size=(channels, height, width), for example input_size=(3, 224, 224)"
    )


def _channels(model: nn.Module) -> int:
    """What the first convolution takes; 3 if there is none."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    return 3


def _pair(value: Any) -> tuple[int, int] | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return value, value
    if isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(v, int) for v in value):
        return int(value[0]), int(value[1])
    return None


def _three(value: Any) -> tuple[int, int]:
    return int(value[1]), int(value[2])
