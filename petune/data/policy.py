"""Apply a list of torchvision's augmentations to one image at a time, and to its mask.

Each image has a generator of its own, so that an image depends neither on its batch nor on the thread that prepares
it. torchvision draws from PyTorch's global generator, which all threads share: `OwnGenerator` redirects it.

Legend: C channels, H height, W width, S side of the model's input.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from petune.base.config import shown
from petune.base.errors import ConfigError, did_you_mean
from petune.base.text import plural
from petune.data.augment import PRESETS
from petune.data.preprocess import resize_bicubic, resize_masks
from petune.data.steps import ERASING, RESIZED_CROP, STEP_PRESETS, StepConfig, build_step, in_unit_range, steps_of

RANDOM_FUNCTIONS = frozenset({
    "bernoulli", "bernoulli_", "exponential_", "multinomial", "normal", "normal_", "rand", "randint", "randn",
    "randperm", "random_", "_sample_dirichlet", "uniform_",
})  # fmt: skip
TRIAL_SIDE, TRIAL_IMAGES = 224, 4
"""Images that a list is tried on when it is configured."""


class OwnGenerator(TorchFunctionMode):
    """Let PyTorch's random functions draw from `generator` inside a `with` block, in this thread only."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call `func`, with the generator if it draws random numbers."""
        options = dict(kwargs or {})
        if getattr(func, "__name__", "") in RANDOM_FUNCTIONS:
            options.setdefault("generator", self.generator)
        return func(*args, **options)


@dataclass(frozen=True)
class Draws:
    """Random choices for one image.

    Attributes:
        generator: For the steps that draw while they work.
        choices: Of the first steps.
    """

    generator: torch.Generator
    choices: list[Any]


class ImagePolicy:
    """A list of augmentations, ready to be applied.

    Args:
        augment: The list, or the name of a preset; see `petune.data.steps`.
        image_size: Side S of the model's input.
        ignore_index: Value of the pixels of a mask that no pixel of the image moves to.

    Raises:
        ConfigError: An unknown name or argument.
    """

    def __init__(self, augment: str | Sequence[StepConfig], image_size: int, ignore_index: int) -> None:
        steps = steps_of(augment) or []
        self.image_size = image_size
        self.steps = [build_step(name, arguments, image_size, ignore_index) for name, arguments in steps]
        self.float_steps = [
            build_step(name, in_unit_range(name, arguments), image_size, ignore_index) for name, arguments in steps
        ]
        self.crops = any(name == RESIZED_CROP for name, _ in steps)

    def __call__(self, image_CHW: Tensor, mask_HW: Tensor | None, seed: int) -> tuple[Tensor, Tensor | None]:
        """Augment an image and its mask.

        Args:
            image_CHW: In 0..255, uint8 or float32; or a clip (T, C, H, W), whose frames are augmented alike.
            mask_HW: Its mask, of the same side or another one.
            seed: Of this image's random numbers.

        Returns:
            The image (C, S, S) or clip (T, C, S, S) in the type it came in, and the mask (S, S).
        """
        return self.apply(image_CHW, mask_HW, self.draw(seed, *image_CHW.shape[-2:]))

    def draw(self, seed: int, height: int, width: int) -> Draws:
        """Draw what crops and flips need that come before other steps.

        Args:
            seed: Of the image's random numbers.
            height, width: Of the image.
        """
        from petune.data.crop_and_flip import ResizedCrop

        generator = torch.Generator().manual_seed(seed)
        size = (height, width) if self.crops else (self.image_size, self.image_size)
        choices = []
        for step in takewhile(_is_own, self.steps):
            choices.append(step.draw(*size, generator))
            if isinstance(step, ResizedCrop):
                size = (self.image_size, self.image_size)
        return Draws(generator, choices)

    def apply(self, image_CHW: Tensor, mask_HW: Tensor | None, draws: Draws) -> tuple[Tensor, Tensor | None]:
        """Augment an image and its mask by what was drawn for an image of its size; see `__call__`."""
        is_float = image_CHW.is_floating_point()
        image, mask = image_CHW / 255 if is_float else image_CHW, mask_HW  # as torchvision takes it
        if not self.crops:
            image = resize_bicubic(image, (self.image_size, self.image_size))
        if mask is not None:
            mask = resize_masks(mask, *image.shape[-2:])
        for number, step in enumerate(self.float_steps if is_float else self.steps):
            if not _is_own(step):
                image, mask = _by_torchvision(step, image, mask, draws.generator)
                continue
            is_drawn = number < len(draws.choices)
            choice = draws.choices[number] if is_drawn else step.draw(*image.shape[-2:], draws.generator)
            image, mask = step.apply(image, mask, choice)
        return image * 255 if is_float else image, mask


def _is_own(step: Any) -> bool:
    from petune.data.crop_and_flip import HorizontalFlip, ResizedCrop, VerticalFlip

    return isinstance(step, ResizedCrop | HorizontalFlip | VerticalFlip)


def _by_torchvision(
    transform: Callable[[Any], Any], image_CHW: Tensor, mask_HW: Tensor | None, generator: torch.Generator
) -> tuple[Tensor, Tensor | None]:
    from torchvision import tv_tensors

    with OwnGenerator(generator):
        if mask_HW is None:
            kind = tv_tensors.Image if image_CHW.ndim == 3 else tv_tensors.Video
            return transform(kind(image_CHW)).as_subclass(Tensor), None
        image, mask = transform((tv_tensors.Image(image_CHW), tv_tensors.Mask(mask_HW)))
    return image.as_subclass(Tensor), mask.as_subclass(Tensor)


def check_augment(
    augment: str | Sequence[StepConfig],
    also: Sequence[str] = (),
    *,
    side: int = TRIAL_SIDE,
    channels: int | None = None,
) -> None:
    """Check the name of a preset, or a list of augmentations by trying it on black images.

    Args:
        augment: The list, or the name.
        also: Other names that are accepted.
        side: Of the images that the backbone takes, in pixels: some steps cannot be applied to small images.
        channels: Of the images; None tries RGB, or as many as a step has values for.

    Raises:
        ConfigError: An unknown name or argument, or a value that torchvision refuses.
    """
    if isinstance(augment, str):
        names = [*also, *PRESETS, *STEP_PRESETS]
        if augment not in names:
            raise ConfigError(f"no such augmentation: {augment}{did_you_mean(augment, names)}")
        return
    if not augment:
        raise ConfigError("the list of augmentations is empty. Use none")
    for name, arguments in steps_of(augment) or ():
        value = arguments.get("value")
        number = channels or (len(value) if name == ERASING and isinstance(value, list | tuple) else 3)
        problem = _problem_of(json.dumps({name: arguments}, default=str), side, number)
        if problem:
            where = f" for {plural(number, 'channel')} of {side}x{side}" if channels else ""
            raise ConfigError(f"the augmentation {shown({name: arguments})} does not work{where}: {problem}")


@lru_cache(maxsize=256)
def _problem_of(step: str, side: int, channels: int) -> str:
    """Return why a step, as JSON, cannot be applied to such images; empty if it can."""
    policy = ImagePolicy([json.loads(step)], side, ignore_index=0)
    image = torch.zeros(channels, side, side, dtype=torch.uint8)
    try:
        for seed in range(TRIAL_IMAGES):
            policy(image, None, seed)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        return " ".join(str(error).split())
    return ""
