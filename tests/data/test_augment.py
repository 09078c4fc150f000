"""Augmentation: follows the formulas, and depends only on (seed, epoch, index of the image)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import functional as TF

from petune.data.augment import (
    NUM_DRAWS,
    PRESETS,
    augment,
    augment_masks,
    epoch_order,
    flip,
    jitter,
    random_draws,
    rotate,
    shift,
)


def _images(count: int = 6, size: int = 16) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(0)).float()


def _draws(count: int, **columns: float | list[float]) -> Tensor:
    names = ["top", "left", "flip", "brightness_on", "brightness", "contrast_on", "contrast", "angle"]
    u = torch.full((count, NUM_DRAWS), 0.5)
    for name, value in columns.items():
        u[:, names.index(name)] = torch.tensor(value)
    return u


def test_draws_depend_on_seed_and_epoch() -> None:
    assert np.array_equal(random_draws(1, 2, 50), random_draws(1, 2, 50))
    tables = [random_draws(1, 2, 50), random_draws(1, 3, 50), random_draws(2, 2, 50)]
    assert all(not np.array_equal(a, b) for i, a in enumerate(tables) for b in tables[:i])
    assert all(table.min() >= 0 and table.max() < 1 for table in tables)


def test_draws_are_uniform() -> None:
    table = random_draws(0, 0, 20_000)
    assert np.abs(table.mean(0) - 0.5).max() < 0.01
    assert np.abs(table.std(0) - 12**-0.5).max() < 0.01
    assert np.abs(np.corrcoef(table.T) - np.eye(NUM_DRAWS)).max() < 0.03


def test_order_is_a_permutation_that_depends_on_seed_and_epoch() -> None:
    orders = [epoch_order(1, 0, 500), epoch_order(1, 1, 500), epoch_order(2, 0, 500)]
    for positions in orders:
        assert np.array_equal(np.sort(positions), np.arange(500))
    assert all(not np.array_equal(a, b) for i, a in enumerate(orders) for b in orders[:i])
    assert np.array_equal(orders[0], epoch_order(1, 0, 500))


@pytest.mark.parametrize("preset", PRESETS)
def test_an_image_does_not_depend_on_its_batch(preset: str) -> None:
    x, u = _images(6), torch.from_numpy(random_draws(3, 1, 6))
    together = augment(x, preset, u)
    for size in (1, 2, 4):
        parts = [augment(x[i : i + size], preset, u[i : i + size]) for i in range(0, 6, size)]
        assert torch.equal(torch.cat(parts), together)


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "none"])
def test_presets_change_images_within_their_range(preset: str) -> None:
    x = _images(32)
    result = augment(x, preset, torch.from_numpy(random_draws(0, 0, 32)))
    changed = (result != x).flatten(1).any(1)
    assert changed.float().mean() > 0.7
    assert result.shape == x.shape
    assert result.dtype == torch.float32
    assert 0 <= float(result.min()) <= float(result.max()) <= 255


def test_preset_none_is_the_identity() -> None:
    x = _images()
    assert torch.equal(augment(x, "none", _draws(6)), x)


def _numpy_crop(x: NDArray[np.float32], top: int, left: int, pad: int) -> NDArray[np.float32]:
    size = x.shape[-1]
    return np.pad(x, ((0, 0), (pad, pad), (pad, pad)))[:, top : top + size, left : left + size]


def test_shift_is_a_crop_of_the_padded_image() -> None:
    x = _images(200, size=32)
    u = torch.from_numpy(random_draws(0, 0, 200))
    result = shift(x, u).numpy()
    tops, lefts = (u[:, :2].numpy() * 9).astype(int).T
    for i in range(200):
        assert np.array_equal(result[i], _numpy_crop(x[i].numpy(), tops[i], lefts[i], pad=4))
    assert set(tops) == set(lefts) == set(range(9))


def test_shift_by_the_padding_is_the_identity() -> None:
    x = _images(1, size=32)
    assert torch.equal(shift(x, _draws(1)), x)


def test_flip_mirrors_below_one_half() -> None:
    x = _images(2)
    result = flip(x, _draws(2, flip=[0.49, 0.5]))
    assert torch.equal(result[0], x[0].flip(2))
    assert torch.equal(result[1], x[1])


@pytest.mark.parametrize("u_brightness", [0.0, 0.3, 0.99])
@pytest.mark.parametrize("u_contrast", [0.0, 0.3, 0.99])
def test_jitter_equals_torchvision(u_brightness: float, u_contrast: float) -> None:
    x = _images(1)
    u = _draws(1, brightness_on=0.1, brightness=u_brightness, contrast_on=0.1, contrast=u_contrast)
    expected = TF.adjust_brightness(x / 255, 0.9 + 0.2 * u_brightness)
    expected = TF.adjust_contrast(expected, 0.9 + 0.2 * u_contrast)
    torch.testing.assert_close(jitter(x, u) / 255, expected, atol=2e-6, rtol=0)


def test_jitter_without_changes_is_the_identity() -> None:
    x = _images(1)
    u = _draws(1, brightness_on=0.5, brightness=0.9, contrast_on=0.5, contrast=0.9)
    torch.testing.assert_close(jitter(x, u), x, atol=1e-4, rtol=0)


def test_rotation_by_zero_is_the_identity() -> None:
    x = _images(3)
    assert torch.equal(rotate(x, _draws(3, angle=0.5)), x)


@pytest.mark.parametrize(("u", "turns"), [(1.0, 1), (0.0, -1)])
def test_rotation_by_a_right_angle(u: float, turns: int) -> None:
    x = _images(2)
    assert torch.equal(rotate(x, _draws(2, angle=u), degrees=90), torch.rot90(x, turns, (2, 3)))


def test_rotation_stays_within_fifteen_degrees_and_fills_with_black() -> None:
    white = torch.full((1, 3, 33, 33), 255.0)
    corner = rotate(white, _draws(1, angle=0.0))
    assert float(corner[0, 0, 0, 0]) == 0
    assert float(corner[0, 0, 16, 16]) == 255
    expected = TF.rotate(white, -15.0)
    assert float((corner != expected).float().mean()) < 0.01


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("channels", [1, 4, 12])
def test_presets_take_any_number_of_channels(preset: str, channels: int) -> None:
    x = _images(6)[:, :1].repeat(1, channels, 1, 1)
    u = torch.from_numpy(random_draws(0, 0, 6))
    one = augment(x[:, :1], preset, u)
    torch.testing.assert_close(augment(x, preset, u), one.repeat(1, channels, 1, 1), atol=1e-3, rtol=0)


@pytest.mark.parametrize("preset", PRESETS)
def test_masks_move_as_their_images(preset: str) -> None:
    masks = torch.randint(1, 20, (40, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    u = torch.from_numpy(random_draws(0, 0, 40))
    moved = augment_masks(masks, preset, u, ignore_index=255)
    # an image whose pixels are their own classes, without the functions that change colors
    images = masks[:, None].float().repeat(1, 3, 1, 1)
    for transform in PRESETS[preset]:
        images = images if transform is jitter else transform(images, u, 0.0)
    expected = torch.where(images[:, 0] == 0, 255, images[:, 0]).to(torch.uint8)
    assert torch.equal(moved, expected)
    assert moved.dtype == torch.uint8
    assert set(moved.unique().tolist()) <= {*range(1, 20), 255}
    assert bool((moved == 255).any()) == (preset != "none")
