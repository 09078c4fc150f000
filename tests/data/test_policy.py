"""Augmentations of single images: each from its own generator, masks along, no trace in the global generator."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from petune.data.augment import image_seeds
from petune.data.batches import TrainBatches, eval_batches
from petune.data.dataset import Split
from petune.data.policy import ImagePolicy, OwnGenerator
from petune.data.preprocess import Preprocess, resize_masks
from petune.data.steps import STEP_PRESETS, STEPS, StepConfig

from .test_steps import NEEDED

CPU = torch.device("cpu")
IGNORE = 255
ANY_CHANNELS = [name for name, kind in STEPS.items() if not kind.channels]
WITH_MASKS = [name for name, kind in STEPS.items() if kind.masks]


def _step(name: str) -> StepConfig:
    return {name: NEEDED.get(name, {})}


def _image(channels: int = 3, side: int = 40, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (channels, side, side), generator=generator).to(torch.uint8)


def _augmented(steps: str | Sequence[StepConfig], image: Tensor, seed: int, mask: Tensor | None = None) -> Any:
    return ImagePolicy(steps, 32, IGNORE)(image, mask, seed)


@pytest.mark.parametrize("name", STEPS)
def test_an_image_depends_on_its_seed_only(name: str) -> None:
    before = torch.get_rng_state()
    images = [_augmented([_step(name)], _image(), seed)[0] for seed in range(12)]
    assert torch.equal(torch.get_rng_state(), before)  # nothing was drawn from the global generator
    torch.manual_seed(5)
    for seed in (11, 3, 0):
        assert torch.equal(_augmented([_step(name)], _image(), seed)[0], images[seed])
    assert all(image.shape == (3, 32, 32) and image.dtype == torch.uint8 for image in images)
    assert any(not torch.equal(image, images[0]) for image in images)


@pytest.mark.parametrize("name", ANY_CHANNELS)
@pytest.mark.parametrize("channels", [1, 4, 12])
def test_geometry_takes_any_number_of_channels(name: str, channels: int) -> None:
    for seed in range(6):
        assert _augmented([_step(name)], _image(channels), seed)[0].shape == (channels, 32, 32)


@pytest.mark.parametrize("name", WITH_MASKS)
def test_a_mask_moves_with_its_image(name: str) -> None:
    """A class is bright in the image: after the augmentation, bright pixels still are that class."""
    mask = torch.zeros(32, 32, dtype=torch.uint8)
    mask[4:20, 8:26] = 7
    image = (mask * 30 + 30)[None].repeat(3, 1, 1)  # 240 inside, 30 outside
    colors_change = STEPS[name].channels or name in {"gaussian_blur"}
    for seed in range(8):
        moved, moved_mask = _augmented([_step(name)], image, seed, mask)
        assert moved_mask.dtype == torch.uint8
        assert set(moved_mask.unique().tolist()) <= {0, 7, IGNORE}
        if colors_change:
            assert torch.equal(moved_mask, mask)
            continue
        seen = moved_mask != IGNORE
        agreement = ((moved[0] > 135) == (moved_mask == 7))[seen].float().mean()
        assert agreement > 0.97, seed
        if name != "random_erasing":
            assert (moved[0][~seen] <= 30).all()


def test_crops_and_flips_are_those_of_torchvision() -> None:
    """They draw the same random numbers and give the same pixels, also where no crop of that ratio fits."""
    for scale, ratio, mode in (
        ([0.2, 1], [0.5, 2], "bicubic"),
        ([1, 1], [3, 4], "bicubic"),
        ([1, 1], [0.2, 1], "bilinear"),
    ):
        crop = {"scale": scale, "ratio": ratio}
        resized_crop = {"random_resized_crop": {**crop, "interpolation": mode}}
        steps: list[StepConfig] = [resized_crop, "horizontal_flip", {"vertical_flip": {"p": 0.3}}]
        theirs = v2.Compose([
            v2.RandomResizedCrop((32, 32), **crop, interpolation=v2.InterpolationMode(mode)),
            v2.RandomHorizontalFlip(),
            v2.RandomVerticalFlip(0.3),
        ])  # fmt: skip
        for seed, image in enumerate([_image(), _image(1), _image(side=9), _image(side=32), _image(4)] * 3):
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                expected = theirs(image)
            assert torch.equal(_augmented(steps, image, seed)[0], expected), (crop, seed)


def test_what_is_rotated_into_a_mask_or_erased_is_ignored() -> None:
    mask = torch.ones(32, 32, dtype=torch.uint8)
    for step in (
        {"rotation": {"degrees": [45, 45]}},
        {"random_erasing": {"p": 1.0}},
        {"affine": {"degrees": [30, 30]}},
    ):
        image, moved = _augmented([step], torch.full((3, 32, 32), 200, dtype=torch.uint8), 0, mask)
        assert torch.equal(moved == IGNORE, image[0] == 0)
        assert (moved == IGNORE).any()


@pytest.mark.parametrize(("stored", "side"), [(224, 160), (160, 224), (32, 224), (7, 5)])
def test_masks_are_resized_to_the_nearest_class(stored: int, side: int) -> None:
    masks = torch.randint(0, 9, (2, stored, stored), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    expected = F.interpolate(masks[:, None], (side, side), mode="nearest-exact")[:, 0]
    assert torch.equal(resize_masks(masks, side, side), expected)


def test_a_cropped_mask_is_resized_to_the_nearest_class() -> None:
    mask = torch.arange(64, dtype=torch.uint8).reshape(8, 8)
    whole: list[StepConfig] = [{"random_resized_crop": {"scale": [1.0, 1.0], "ratio": [1.0, 1.0]}}]
    moved = ImagePolicy(whole, 6, IGNORE)(mask[None], mask, 0)[1]
    assert torch.equal(moved, resize_masks(mask, 6, 6))


def test_another_thread_keeps_the_global_generator() -> None:
    inside, done = threading.Event(), threading.Event()

    def work() -> None:
        with OwnGenerator(torch.Generator().manual_seed(1)):
            torch.rand(3)
            inside.set()
            done.wait(10)

    torch.manual_seed(3)
    expected = torch.rand(4)
    thread = threading.Thread(target=work)
    thread.start()
    inside.wait(10)
    torch.manual_seed(3)
    drawn = torch.rand(4)
    done.set()
    thread.join()
    assert torch.equal(drawn, expected)


def test_seeds_of_images_depend_on_seed_epoch_and_index_only() -> None:
    assert np.array_equal(image_seeds(1, 2, 50)[:20], image_seeds(1, 2, 20))
    tables = [image_seeds(1, 2, 50), image_seeds(1, 3, 50), image_seeds(2, 2, 50)]
    assert len(np.unique(np.concatenate(tables))) == 150


def _split(count: int, side: int, dtype: Any = np.uint8, channels: int = 3) -> Split:
    generator = np.random.default_rng(0)
    scale = 257 if dtype == np.uint16 else 1
    images = (generator.integers(0, 256, (count, side, side, channels)) * scale).astype(dtype)
    return Split.of(images, generator.integers(0, 3, count), 0.875)


@pytest.mark.parametrize("preset", STEP_PRESETS)
def test_batches_do_not_depend_on_size_start_or_threads(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    split, preprocess = _split(12, 37), Preprocess(32, (0.5,) * 3, (0.5,) * 3)
    whole = next(TrainBatches(split, preprocess, preset, 12, 4, CPU).epoch(1))
    by_position = dict(zip(whole.positions.tolist(), whole.x_BCHW, strict=True))
    for size, start, threads in ((1, 0, 1), (5, 1, 3), (4, 2, 16)):
        monkeypatch.setattr("petune.data.batches.num_threads", lambda threads=threads: threads)
        for batch in TrainBatches(split, preprocess, preset, size, 4, CPU).epoch(1, start):
            for position, x, y in zip(batch.positions.tolist(), batch.x_BCHW, batch.y_B, strict=True):
                assert torch.equal(x, by_position[position])
                assert int(y) == split.targets[position]
    other = next(TrainBatches(split, preprocess, preset, 12, 4, CPU).epoch(2))
    order = [torch.from_numpy(np.argsort(batch.positions)) for batch in (whole, other)]
    assert not torch.equal(whole.x_BCHW[order[0]], other.x_BCHW[order[1]])


def test_the_crop_preset_takes_35_to_100_percent_of_what_the_model_sees() -> None:
    ramp = torch.arange(64, dtype=torch.uint8).repeat(64, 1)[None]
    policy = ImagePolicy("crop", 64, IGNORE)
    spans = []
    for seed in range(300):
        image = policy(ramp, None, seed)[0].float()
        spans.append(abs(float(image[0, 32, 60] - image[0, 32, 3])) * 64 / 57 / 64)
    areas = np.square(spans)
    assert areas.min() == pytest.approx(0.35, abs=0.05)
    assert areas.max() == pytest.approx(1.0, abs=0.05)
    assert areas.mean() == pytest.approx(0.675, abs=0.04)


@pytest.mark.parametrize("augment", ["none", "crop"])
def test_sixteen_bit_images_do_not_wrap_around(augment: str) -> None:
    eight, sixteen = _split(4, 37), _split(4, 37, np.uint16)
    preprocess = Preprocess(20, (0.5,) * 3, (0.5,) * 3)
    a, b = (next(TrainBatches(split, preprocess, augment, 4, 0, CPU).epoch(0)).x_BCHW for split in (eight, sixteen))
    torch.testing.assert_close(a, b, atol=0.1, rtol=0)  # white is 1; uint8 is rounded between rows and columns
    a, b = (next(eval_batches(split, preprocess, 4, CPU)).x_BCHW for split in (eight, sixteen))
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


@pytest.mark.parametrize("augment", ["none", "paddle_study", "crop"])
def test_images_of_twelve_bands(augment: str) -> None:
    split, preprocess = _split(4, 37, channels=12), Preprocess(32, (0.5,) * 12, (0.5,) * 12)
    assert next(TrainBatches(split, preprocess, augment, 4, 0, CPU).epoch(0)).x_BCHW.shape == (4, 12, 32, 32)


@pytest.mark.parametrize("augment", ["none", "light", "paddle_study", "crop", ["horizontal_flip", "random_erasing"]])
def test_batches_of_masks(augment: Any) -> None:
    images = np.repeat(np.random.default_rng(0).integers(1, 3, (6, 37, 37, 1), dtype=np.uint8), 3, axis=3)
    rows = np.array([5, 2, 2, 0])
    split = Split(images * 100, images[..., 0], rows, 0.875)
    preprocess = Preprocess(32, (0.0,) * 3, (1 / 255,) * 3)
    for batch in TrainBatches(split, preprocess, augment, 4, 0, CPU, ignore_index=IGNORE).epoch(0):
        assert batch.y_B.shape == (4, 32, 32)
        assert batch.y_B.dtype == torch.uint8
        assert set(batch.y_B.unique().tolist()) <= {1, 2, IGNORE}
        if augment in ("none", "light"):
            expected = (batch.x_BCHW[:, 0] / 100).round()
            assert torch.equal(torch.where(batch.y_B == IGNORE, 0, batch.y_B).float(), expected)
    for batch in eval_batches(split, preprocess, 4, CPU):
        assert torch.equal(batch.x_BCHW[:, 0], batch.y_B * 100.0)


def test_other_devices_get_whole_batches() -> None:
    split, preprocess, meta = _split(5, 37), Preprocess(32, (0.5,) * 3, (0.5,) * 3), torch.device("meta")
    batch = next(TrainBatches(split, preprocess, "crop", 5, 0, meta).epoch(0))
    assert batch.x_BCHW.device == batch.y_B.device == meta
    assert (batch.x_BCHW.shape, batch.x_BCHW.dtype) == ((5, 3, 32, 32), torch.float32)


@pytest.mark.parametrize(
    "step", [{"random_erasing": {"p": 1.0, "value": 200}}, {"solarize": {"threshold": 100, "p": 1}}]
)
def test_values_of_pixels_mean_the_same_for_every_type_of_image(step: dict[str, Any]) -> None:
    image_CHW = torch.randint(0, 256, (3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    policy = ImagePolicy([step], 16, ignore_index=255)
    expected, _ = policy(image_CHW, None, seed=3)
    from_floats, _ = policy(image_CHW.float(), None, seed=3)
    assert not torch.equal(expected, image_CHW)
    torch.testing.assert_close(from_floats, expected.float(), rtol=0, atol=0.01)


def test_frames_of_a_clip_have_the_border_of_an_image() -> None:
    step: StepConfig = {"rotation": {"degrees": [30, 30], "interpolation": "bilinear"}}
    image_CHW = torch.full((3, 16, 16), 200, dtype=torch.uint8)
    clip, _ = _augmented([step], image_CHW.expand(2, -1, -1, -1), 0)
    assert torch.equal(clip[1], _augmented([step], image_CHW, 0)[0])
