"""Video models of transformers: the names of their options, their statistics, and position embeddings in time."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from petune.backbones.timm_models import set_statistics
from petune.base.errors import ConfigError, WeightsUnavailable
from petune.sites.input_size import FRAMES, frames_of


def by_config_key(config: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with `image_size` and `num_frames` under the names that a config has for them.

    Models of images have no number of frames: they take them one by one.

    Args:
        config: The config of a model.
        options: See `petune.backbones.transformers_models.build_hf`.

    Raises:
        ConfigError: Frames would be left out, because the model joins several of them.
    """
    has_crop_size = hasattr(config, "crop_size") and not hasattr(config, "image_size")
    keys = {"num_frames": frames_key(config), "image_size": "crop_size" if has_crop_size else "image_size"}
    renamed = {keys.get(key, key): value for key, value in options.items()}
    _check_tubes(config, options.get("num_frames"))
    return {key: value for key, value in renamed.items() if key is not None}


def frames_key(config: Any) -> str | None:
    """Return the name of the number of frames in a config; None if it is of a model of images.

    Perceiver's config has a number of frames for other uses of it, but no size of patches.
    """
    if not hasattr(config, "patch_size") and not hasattr(config, "tubelet_size"):
        return None
    return next((key for key in FRAMES if hasattr(config, key)), None)


def _check_tubes(config: Any, num_frames: int | None) -> None:
    length = Tubes.of(config).length if frames_key(config) is not None else 1
    if num_frames is not None and num_frames % length:
        raise ConfigError(
            f"{type(config).__name__} joins {length} frames at a time, so that {num_frames} frames would not all be "
            f"seen. Use a multiple of {length}"
        )


@dataclass(frozen=True)
class Tubes:
    """Sizes of the patches of a video.

    Attributes:
        length: Frames of a patch.
        patch: Pixels along one side.
        times: Patches in time.
    """

    length: int
    patch: int
    times: int

    @classmethod
    def of(cls, config: Any) -> Tubes:
        """Read them from a config of a model of videos."""
        size = getattr(config, "tubelet_size", 1)
        length, patch = (size[0], size[-1]) if isinstance(size, list | tuple) else (size, config.patch_size)
        return cls(length, patch, getattr(config, str(frames_key(config))) // length)

    def prefix_and_slices(self, lengths: tuple[int, int], image_sizes: tuple[int, int]) -> tuple[int, int] | None:
        """Return how many tokens of a position embedding are not patches, and how many frames the others are of.

        Args:
            lengths: Of the position embedding, new and old.
            image_sizes: The same for the sides of a frame in pixels.

        Returns:
            None if the embedding is of something else.
        """
        for slices in (1, self.times):
            new, old = (n - slices * (side // self.patch) ** 2 for n, side in zip(lengths, image_sizes, strict=True))
            if new == old and 0 <= new < 4:
                return new, slices
        return None


def check_frames(name: str, config: Any, offline: bool) -> None:
    """Check that a model that its weights do not fill is not one of videos with another number of frames.

    Raises:
        WeightsUnavailable: It is.
    """
    key = frames_key(config)
    own_config = type(config).from_pretrained(name, local_files_only=offline)
    if key is None or getattr(config, key) == getattr(own_config, key):
        return
    wanted, own = getattr(config, key), getattr(own_config, key)
    raise WeightsUnavailable(
        f"the weights of hf:{name} are for clips of {own} frames, and their position embeddings in time cannot be "
        f"resized to {wanted}. Use clips of {own} frames, such as dataset='video:PATH,frames={own}', or weights='none'",
        cli_hint="To start from random weights, use --weights none",
    )


def set_video_statistics(model: nn.Module, name: str, offline: bool) -> None:
    """Record how transformers would normalize videos, measured on a black and a white one.

    Some processors scale to -1…1 before they normalize, whatever their options say (ViViT).
    """
    from transformers import AutoImageProcessor, AutoVideoProcessor

    for auto_class in (AutoImageProcessor, AutoVideoProcessor):  # older repositories have one of images
        with contextlib.suppress(OSError):
            processor = auto_class.from_pretrained(name, local_files_only=offline)
            break
    else:
        return
    frames = frames_of(model) or 1
    black_C, white_C = (_center(processor([np.full((32, 32, 3), v, np.uint8)] * frames)) for v in (0, 255))
    std_C = 1 / (white_C - black_C)
    set_statistics(model, (-black_C * std_C).tolist(), std_C.tolist())


def _center(processed: Any) -> Tensor:
    """Return the middle pixel (channels,) of the first frame that a processor of videos returns."""
    frame = torch.as_tensor(np.asarray(next(iter(processed.values())))).double()
    frame = frame.reshape(-1, *frame.shape[-3:])[0]
    return frame[:, frame.shape[1] // 2, frame.shape[2] // 2]
