"""Lists of torchvision's augmentations: what is wrong in them is refused when they are configured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

import petune
from petune.base.errors import ConfigError
from petune.data import Split
from petune.data.augment import PRESETS
from petune.data.policy import ImagePolicy
from petune.data.steps import STEP_PRESETS, STEPS, build_step, check_images, check_split
from petune.training.config import TrainConfig

NEEDED: dict[str, dict[str, Any]] = {
    "rotation": {"degrees": 20},
    "affine": {"degrees": 10, "translate": [0.1, 0.1], "scale": [0.8, 1.2]},
    "color_jitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1},
    "gaussian_blur": {"kernel_size": 3},
    "sharpness": {"sharpness_factor": 2.0},
    "posterize": {"bits": 4},
    "solarize": {"threshold": 128},
}
"""Arguments of the augmentations that have no defaults, or none that does something."""


@pytest.mark.parametrize("name", STEPS)
def test_every_name_is_a_transform_of_torchvision(name: str) -> None:
    step = build_step(name, NEEDED.get(name, {}), 32, 255)
    assert isinstance(step, getattr(v2, STEPS[name].transform))


@pytest.mark.parametrize("preset", STEP_PRESETS)
def test_presets_and_lists_are_accepted_and_written_as_given(preset: str) -> None:
    assert TrainConfig(augment=preset).augment == preset
    steps = STEP_PRESETS[preset]
    config = TrainConfig(augment=steps)
    assert config.augment == steps
    assert TrainConfig.build(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("augment", "key", "hint"),
    [
        ("crap", "crap", "crop"),
        (["horizontl_flip"], "horizontl_flip", "horizontal_flip"),
        (["RandAugment"], "RandAugment", "rand_augment"),
        ([{"random_resized_crop": {"scales": [0.5, 1]}}], "scales", "scale"),
        ([{"rand_augment": {"interpolation": "bicubi"}}], "bicubi", "bicubic"),
        ([{"auto_augment": {"policy": "cifar"}}], "cifar", "cifar10"),
        ([{"random_resized_crop": {"size": 32}}], "size", "set by petune"),
        ([{"random_resized_crop": {"scale": [1.0, 0.5]}}], "random_resized_crop", "(min, max)"),
        ([{"rand_augment": {"magnitude": 40}}], "rand_augment", "40"),
        ([{"color_jitter": {"brightness": "much"}}], "color_jitter", "brightness"),
        ([{"random_erasing": {"value": "random"}}], "random_erasing", "number"),
        (["rotation"], "rotation", "degrees"),
        ([{"horizontal_flip": {"p": 2}}], "horizontal_flip", "p"),
        ([{"horizontal_flip": {}, "vertical_flip": {}}], "vertical_flip", "a name"),
        ([], "augment", "none"),
    ],
)
def test_what_is_wrong_is_named_when_it_is_configured(augment: Any, key: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig(augment=augment)
    assert caught.value.problems[0].key == "augment"
    assert key in str(caught.value)
    assert hint in str(caught.value)


@pytest.mark.parametrize("preset", ["randaug", "trivial", "augmix"])
def test_policies_refuse_masks(preset: str) -> None:
    check_images(preset, 3, masks=False)
    with pytest.raises(ConfigError, match="masks"):
        check_images(preset, 3, masks=True)


@pytest.mark.parametrize("name", [name for name, kind in STEPS.items() if kind.channels])
def test_color_augmentations_refuse_images_of_many_bands(name: str) -> None:
    step = {name: NEEDED.get(name, {})}
    check_images([step], 3, masks=False)
    with pytest.raises(ConfigError, match=f"{name}.*channels, not 12"):
        check_images([step], 12, masks=False)


@pytest.mark.parametrize("augment", ["none", "shift", "light", "paddle_study", "crop"])
def test_the_other_presets_take_masks_and_any_number_of_channels(augment: str) -> None:
    check_images(augment, 12, masks=True)


def images(low: float, high: float, dtype: str, channels: int = 3) -> Split:
    values = np.linspace(low, high, 2 * 32 * 32 * channels).reshape(2, 32, 32, channels)
    return Split.of(values.astype(dtype), np.zeros(2, np.int64))


COLOR_PRESETS = {"paddle_study", "randaug", "trivial", "augmix", "color"}


@pytest.mark.parametrize("preset", [*PRESETS, *STEP_PRESETS])
def test_presets_with_a_white_refuse_floats_outside_0_to_1(preset: str) -> None:
    for split in (images(0, 1, "float32"), images(-0.2, 1.2, "float32"), images(0, 65535, "uint16")):
        check_split(preset, split)  # resizing leaves the range by a little
    for low, high in ((200, 600), (-1, 1)):
        if preset in COLOR_PRESETS:
            with pytest.raises(ConfigError, match=f"takes floats from 0.*have values from {low} to {high}"):
                check_split(preset, images(low, high, "float32"))
        else:
            check_split(preset, images(low, high, "float32"))


@pytest.mark.parametrize("name", STEPS)
def test_steps_that_distort_floats_are_refused(name: str) -> None:
    split = images(200, 600, "float32")
    step = {name: NEEDED.get(name, {})}
    try:
        check_split([step], split)
    except ConfigError:
        return
    policy = ImagePolicy([step], 32, 255)
    image = torch.from_numpy(split.images[0]).movedim(-1, 0) * 255
    changed = torch.stack([policy(image, None, seed)[0] for seed in range(8)]) / 255
    kept = changed[changed != 0]  # corners and erased pixels are black
    assert kept.max() > 300
    assert kept.min() > 0


@pytest.mark.parametrize("augment", ["paddle_study", "color"])
def test_a_run_on_floats_of_another_unit_is_refused(augment: str, tmp_path: Path) -> None:
    for i in range(20):
        folder = tmp_path / "heights" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{i}.npy", np.full((8, 8, 3), 200 + i, np.float32))  # meters
    run: dict[str, Any] = {
        "method": "linear", "backbone": "vit_nano", "weights": "none", "device": "cpu", "image_size": 8,
        "backbone_options": {"depth": 1, "embed_dim": 24, "num_heads": 2}, "dataset": f"folder:{tmp_path / 'heights'}",
    }  # fmt: skip
    train = {"epochs": 1, "batch_size": 8, "precision": "fp32", "augment": augment}
    with pytest.raises(ConfigError, match="have values from 200 to 219"):
        petune.run(**run, train=train, output=tmp_path / "refused")
    assert petune.run(**run, train={**train, "augment": "crop"}, output=tmp_path / "run").top1 is not None
