"""Augmentations of torchvision.transforms.v2 by name, and lists of them: `[random_resized_crop, horizontal_flip]`.

A list is checked when it is configured: names, arguments, and what the images allow. `petune.data.policy` applies it.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from petune.base.config import shown
from petune.base.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from petune.data.dataset import Split

StepConfig = str | dict[str, dict[str, Any]]
"""A name, or one name with its arguments: `{random_resized_crop: {scale: [0.5, 1.0]}}`."""
OVERSHOOT = 0.3
"""Largest amount by which bicubic resizing leaves the range of an image."""
RESIZED_CROP, ERASING, SOLARIZE = "random_resized_crop", "random_erasing", "solarize"


@dataclass(frozen=True)
class StepKind:
    """An augmentation of torchvision.transforms.v2.

    Attributes:
        transform: Name of its class.
        channels: Numbers of channels that it takes; empty if any.
        masks: It moves masks along, or leaves them as they are because it moves no pixel.
        fixed: Arguments that petune sets itself.
        has_white: It computes with black and white, so it cuts off or distorts floats outside 0..1.
    """

    transform: str
    channels: tuple[int, ...] = ()
    masks: bool = True
    fixed: tuple[str, ...] = ()
    has_white: bool = False


RGB, GRAY_OR_RGB = (3,), (1, 3)
STEPS = {
    RESIZED_CROP: StepKind("RandomResizedCrop", fixed=("size", "antialias")),
    "horizontal_flip": StepKind("RandomHorizontalFlip"),
    "vertical_flip": StepKind("RandomVerticalFlip"),
    "rotation": StepKind("RandomRotation", fixed=("expand", "fill")),
    "affine": StepKind("RandomAffine", fixed=("fill",)),
    "perspective": StepKind("RandomPerspective", fixed=("fill",)),
    "elastic": StepKind("ElasticTransform", fixed=("fill",)),
    "rand_augment": StepKind("RandAugment", RGB, masks=False, fixed=("fill",), has_white=True),
    "trivial_augment": StepKind("TrivialAugmentWide", RGB, masks=False, fixed=("fill",), has_white=True),
    "auto_augment": StepKind("AutoAugment", RGB, masks=False, fixed=("fill",), has_white=True),
    "aug_mix": StepKind("AugMix", RGB, masks=False, fixed=("fill",), has_white=True),
    "color_jitter": StepKind("ColorJitter", GRAY_OR_RGB, has_white=True),
    "photometric_distort": StepKind("RandomPhotometricDistort", RGB, has_white=True),
    "grayscale": StepKind("RandomGrayscale", GRAY_OR_RGB, fixed=("num_output_channels",)),
    "gaussian_blur": StepKind("GaussianBlur"),
    "sharpness": StepKind("RandomAdjustSharpness", GRAY_OR_RGB, has_white=True),
    "autocontrast": StepKind("RandomAutocontrast", GRAY_OR_RGB, has_white=True),
    "equalize": StepKind("RandomEqualize", GRAY_OR_RGB, has_white=True),
    "invert": StepKind("RandomInvert", GRAY_OR_RGB, has_white=True),
    "posterize": StepKind("RandomPosterize", GRAY_OR_RGB, has_white=True),
    SOLARIZE: StepKind("RandomSolarize", GRAY_OR_RGB, has_white=True),
    ERASING: StepKind("RandomErasing", fixed=("inplace",)),
}
"""The augmentations, by petune's name."""
PIXEL_VALUES = {(ERASING, "value"), (SOLARIZE, "threshold")}
"""Arguments that are values of pixels, in 0..255 whatever the type of the images."""
RANGES: dict[tuple[str, str], tuple[float, float]] = {
    (RESIZED_CROP, "scale"): (1e-4, 1), (ERASING, "scale"): (0, 1), **dict.fromkeys(PIXEL_VALUES, (0, 255)),
}  # fmt: skip
"""Smallest and largest value of arguments that torchvision does not check."""
_CROP: StepConfig = {RESIZED_CROP: {"scale": [0.35, 1.0], "ratio": [1.0, 1.0], "interpolation": "bicubic"}}
STEP_PRESETS: dict[str, list[StepConfig]] = {
    "crop": [_CROP, "horizontal_flip"],
    "crop_only": [_CROP],
    "randaug": [_CROP, "horizontal_flip", {"rand_augment": {"num_ops": 2, "magnitude": 9}}],
    "trivial": [_CROP, "horizontal_flip", "trivial_augment"],
    "augmix": [_CROP, "horizontal_flip", "aug_mix"],
    "color": [_CROP, "horizontal_flip", {"color_jitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4}}],
}
"""Lists by name."""


def steps_of(augment: str | Sequence[StepConfig]) -> list[tuple[str, dict[str, Any]]] | None:
    """Return names and arguments of a list or of the preset of that name; None for a preset of `petune.data.augment`.

    Raises:
        ConfigError: A step is neither a name nor one name with its arguments.
    """
    if isinstance(augment, str):
        return steps_of(STEP_PRESETS[augment]) if augment in STEP_PRESETS else None
    return [_name_and_arguments(step) for step in augment]


def _name_and_arguments(step: Any) -> tuple[str, dict[str, Any]]:
    if isinstance(step, str):
        return step, {}
    if isinstance(step, Mapping) and len(step) == 1:
        name, arguments = next(iter(step.items()))
        if isinstance(name, str) and isinstance(arguments, Mapping | None):
            return name, dict(arguments or {})
    raise ConfigError(f"not an augmentation: {shown(step)}. Write a name, or {{name: {{argument: value}}}}")


def in_unit_range(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a step for images in 0..1, as torchvision takes those of floats."""
    return {
        key: np.divide(value, 255).tolist() if (name, key) in PIXEL_VALUES else value
        for key, value in arguments.items()
    }


def build_step(name: str, arguments: Mapping[str, Any], image_size: int, ignore_index: int) -> Any:
    """Return a transform of torchvision.transforms.v2, or petune's own variant of it.

    Args:
        name, arguments: The step.
        image_size: Side of what a crop returns, in pixels.
        ignore_index: Value of the pixels of a mask that no pixel of the image moves to.

    Raises:
        ConfigError: There is no such augmentation or argument, or torchvision refuses a value.
    """
    from torchvision import tv_tensors
    from torchvision.transforms import v2

    from petune.data import crop_and_flip, mask_steps

    if name not in STEPS:
        raise ConfigError(f"no such augmentation: {name}{did_you_mean(name, list(STEPS))}")
    kind = STEPS[name]
    transform = getattr(v2, kind.transform)
    own: dict[str, Any] = {
        RESIZED_CROP: crop_and_flip.ResizedCrop,
        "horizontal_flip": crop_and_flip.HorizontalFlip,
        "vertical_flip": crop_and_flip.VerticalFlip,
        ERASING: partial(mask_steps.Erasing, ignore_index),
    }
    build = own.get(name, transform)
    known = [key for key in inspect.signature(transform).parameters if key not in kind.fixed]
    for key in arguments:
        if key in kind.fixed:
            raise ConfigError(f"{name}: {key} is set by petune. Leave it out")
        if key not in known:
            hint = did_you_mean(key, known) or f". It has {', '.join(known) or 'none'}"
            raise ConfigError(f"{name}: no such argument: {key}{hint}")
    values = {key: _value(name, key, value) for key, value in arguments.items()}
    if "size" in kind.fixed:
        values["size"] = (image_size, image_size)
    if "fill" in kind.fixed and kind.masks:
        values["fill"] = {tv_tensors.Image: 0, tv_tensors.Video: 0, tv_tensors.Mask: ignore_index}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # torchvision warns of a scale from large to small
            return build(**values)
    except (TypeError, ValueError, KeyError, UserWarning) as error:
        raise ConfigError(f"{name}: {' '.join(str(error).split())}") from None


def _value(name: str, key: str, value: Any) -> Any:
    """Return an argument as torchvision takes it: its own types for names, all else as it is."""
    from torchvision.transforms import v2

    types: dict[str, type[Enum]] = {"interpolation": v2.InterpolationMode, "policy": v2.AutoAugmentPolicy}
    if key in types:
        members = {member.value: member for member in types[key]}
        if value not in members:
            raise ConfigError(f"{name}: no such {key}: {value}{did_you_mean(str(value), list(members))}")
        return members[value]
    numbers = value if isinstance(value, list | tuple) else [value]
    low, high = RANGES.get((name, key), (-math.inf, math.inf))
    if high < math.inf and not all(isinstance(v, int | float) and low <= v <= high for v in numbers):
        raise ConfigError(f"{name}: {key} is {value!r}. Use numbers from {low} to {high}")
    return value


def check_split(augment: str | Sequence[StepConfig], split: Split) -> None:
    """Check that a list of augmentations can be applied to the images of a split; floats are read for it.

    Args:
        augment: The list, or the name of a preset.
        split: The images.

    Raises:
        ConfigError: As `check_images`; or a step is for values from black to white, and the images have others.
    """
    check_images(augment, split.images.shape[-1], masks=split.has_masks)
    name = _step_with_white(augment)
    if name is None or not len(split) or np.dtype(split.images.dtype).kind != "f":
        return
    low, high = split.value_range()
    if low < -OVERSHOOT or high > 1 + OVERSHOOT:
        raise ConfigError(
            f"the augmentation {name} takes floats from 0 (black) to 1 (white), and the images have values from "
            f"{low:g} to {high:g}. Scale them to 0..1, or use others, such as crop or light",
            cli_hint="Set it with --augment",
        )


def _step_with_white(augment: str | Sequence[StepConfig]) -> str | None:
    from petune.data.augment import COLOR, PRESETS

    if isinstance(augment, str) and augment in PRESETS:
        return augment if {*PRESETS[augment]} & {*COLOR} else None
    return next((name for name, _ in steps_of(augment) or () if STEPS[name].has_white), None)


def check_images(augment: str | Sequence[StepConfig], channels: int, *, masks: bool) -> None:
    """Check that a list of augmentations can be applied to the images of a dataset.

    Args:
        augment: The list, or the name of a preset.
        channels: Channels of the images.
        masks: The targets are masks.

    Raises:
        ConfigError: A step needs another number of channels, or cannot move masks along.
    """
    for name, _ in steps_of(augment) or ():
        kind = STEPS[name]
        if kind.channels and channels not in kind.channels:
            numbers = " or ".join(map(str, kind.channels))
            raise ConfigError(
                f"the augmentation {name} is for images of {numbers} channels, not {channels}. "
                "Use others, such as crop or light",
                cli_hint="Set it with --augment",
            )
        if masks and not kind.masks:
            raise ConfigError(
                f"the augmentation {name} cannot move masks along with their images. "
                "Use others, such as crop, light or color",
                cli_hint="Set it with --augment",
            )
