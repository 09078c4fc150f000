"""Batches: resumable in the middle of an epoch, each image once, preprocessed for the backbone."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from petune.base.distributed import Group
from petune.base.errors import ConfigError
from petune.data.batches import (
    MAX_LEFT_OUT,
    Batch,
    Preprocess,
    TrainBatches,
    batch_bounds,
    eval_batches,
    prefetch,
)
from petune.data.dataset import Split

CPU = torch.device("cpu")
PLAIN = Preprocess(8, (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))


def _split(count: int, side: int = 8, crop: float = 1.0) -> Split:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return Split.of(images, generator.integers(0, 3, count), crop)


def _batches(split: Split, batch_size: int, seed: int = 0, preset: str = "paddle_study") -> TrainBatches:
    return TrainBatches(split, PLAIN, preset, batch_size, seed, CPU)


@pytest.mark.parametrize("start", [1, 2, 3])
def test_a_resumed_epoch_yields_the_same_batches(start: int) -> None:
    batches = _batches(_split(17), 5)
    whole, rest = list(batches.epoch(2)), list(batches.epoch(2, start))
    assert len(whole) == len(batches) == 4
    assert len(rest) == 4 - start
    for a, b in zip(whole[start:], rest, strict=True):
        assert torch.equal(a.x_BCHW, b.x_BCHW)
        assert torch.equal(a.y_B, b.y_B)
        assert np.array_equal(a.positions, b.positions)


def test_augmentation_does_not_depend_on_the_batch_size() -> None:
    split, seen = _split(12), {}
    for size in (1, 3, 4, 12):
        for batch in _batches(split, size).epoch(1):
            for position, x in zip(batch.positions.tolist(), batch.x_BCHW, strict=True):
                assert torch.equal(seen.setdefault(position, x), x)
    assert sorted(seen) == list(range(12))


def test_epochs_and_seeds_differ() -> None:
    split = _split(12)
    first, other_epoch = (next(_batches(split, 12).epoch(e)) for e in (0, 1))
    other_seed = next(_batches(split, 12, seed=1).epoch(0))
    for other in (other_epoch, other_seed):
        assert not np.array_equal(first.positions, other.positions)
        by_position = (
            torch.from_numpy(np.argsort(first.positions)),
            torch.from_numpy(np.argsort(other.positions)),
        )
        assert not torch.equal(first.x_BCHW[by_position[0]], other.x_BCHW[by_position[1]])


def test_a_batch_larger_than_the_split_is_the_split() -> None:
    batches = _batches(_split(7), 100)
    assert len(batches) == 1
    assert sorted(next(batches.epoch(0)).positions) == list(range(7))


def test_labels_match_pixels() -> None:
    split = _split(9).take(np.array([8, 2, 5, 3]))
    for batch in _batches(split, 2, preset="none").epoch(0):
        for x, y, position in zip(batch.x_BCHW, batch.y_B, batch.positions, strict=True):
            assert int(y) == split.targets[position]
            assert np.array_equal(x.permute(1, 2, 0).round().numpy(), split.images[split.rows[position]])


def test_evaluation_yields_every_image_once_in_order() -> None:
    split = _split(11)
    batches = list(eval_batches(split, PLAIN, 4, CPU))
    assert [len(b.y_B) for b in batches] == [4, 4, 3]
    assert np.concatenate([b.positions for b in batches]).tolist() == list(range(11))
    assert torch.equal(torch.cat([b.y_B for b in batches]), torch.from_numpy(split.targets))


def test_normalize_follows_the_formula() -> None:
    preprocess = Preprocess(8, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    x = torch.rand(2, 3, 8, 8) * 255
    mean, std = torch.tensor(preprocess.mean).view(3, 1, 1), torch.tensor(preprocess.std).view(3, 1, 1)
    torch.testing.assert_close(preprocess.normalize(x), (x / 255 - mean) / std)


def test_statistics_of_the_split_give_zero_mean_and_unit_variance() -> None:
    split = _split(50)
    preprocess = Preprocess(8, *split.channel_statistics())
    x = torch.cat([b.x_BCHW for b in eval_batches(split, preprocess, 50, CPU)])
    assert x.mean((0, 2, 3)).abs().max() < 1e-4
    assert (x.std((0, 2, 3)) - 1).abs().max() < 1e-3


@pytest.mark.parametrize("image_size", [8, 9, 32, 37, 224, 384])
def test_a_stored_margin_is_cropped(image_size: int) -> None:
    side = math.ceil(image_size / 0.875)
    split = _split(1, side, crop=0.875)
    pixels = Preprocess(image_size, (0.0,) * 3, (1.0,) * 3).pixels(split, np.array([0]), CPU)
    top = (side - image_size) // 2
    expected = split.images[0, top : top + image_size, top : top + image_size]
    assert np.array_equal(pixels[0].permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("image_size", [4, 6, 7, 8, 12, 16])
def test_images_without_a_margin_are_scaled_not_cropped(image_size: int) -> None:
    ramp = np.broadcast_to(np.arange(0, 160, 20, dtype=np.uint8)[None, :, None], (8, 8, 3))[None]
    split = Split.of(np.ascontiguousarray(ramp), np.zeros(1, dtype=np.int64))
    pixels = Preprocess(image_size, (0.0,) * 3, (1.0,) * 3).pixels(split, np.array([0]), CPU)
    assert pixels.shape == (1, 3, image_size, image_size)
    row = pixels[0, 0, 0]
    assert float(row.mean()) == pytest.approx(70, abs=1)
    assert float(row[0]) < 20
    assert float(row[-1]) > 120


def test_prefetch_yields_the_same_batches_and_stays_one_ahead() -> None:
    batches, prepared = _batches(_split(17), 5), list[int]()

    def counted() -> Iterator[Batch]:
        for number, batch in enumerate(batches.epoch(1)):
            assert threading.current_thread() is not threading.main_thread()
            prepared.append(number)
            yield batch

    for number, (a, b) in enumerate(zip(prefetch(counted(), CPU), batches.epoch(1), strict=True)):
        assert torch.equal(a.x_BCHW, b.x_BCHW)
        assert torch.equal(a.y_B, b.y_B)
        assert len(prepared) <= number + 2


def test_prefetch_raises_errors_and_may_be_closed_early() -> None:
    def failing() -> Iterator[Batch]:
        yield next(iter(_batches(_split(17), 5).epoch(0)))
        raise OSError("the disk is gone")

    batches = prefetch(failing(), CPU)
    next(batches)
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)
    unfinished = prefetch(_batches(_split(17), 5).epoch(0), CPU)
    next(unfinished)
    unfinished.close()


def test_positions_only() -> None:
    batches = _batches(_split(17), 5)
    whole = list(batches.epoch(1))
    for a, b in zip(whole, batches.epoch(1, positions_only=True), strict=True):
        assert np.array_equal(b.x_BCHW.numpy(), a.positions)
        assert torch.equal(a.y_B, b.y_B)
    positions = [b.x_BCHW for b in eval_batches(_split(17), PLAIN, 5, CPU, positions_only=True)]
    assert torch.equal(torch.cat(positions), torch.arange(17))


@pytest.mark.parametrize(
    ("num_images", "batch_size", "sizes"),
    [
        (220, 128, [110, 110]),  # a quarter of full batches would leave out 92
        (300, 128, [100, 100, 100]),
        (7, 100, [7]),
        (129, 128, [128]),  # leaves out less than 1 %
        (45_000, 128, [128] * 351),  # leaves out 72, as in the published results
        (1_000, 64, [64] * 15),  # leaves out 40, as in the published results
        (26, 6, [5, 5, 5, 5, 6]),
        (7, 2, [2, 2, 2]),  # no batch of a single image, which BatchNorm refuses
        (7, 1, [1] * 7),
    ],
)
def test_an_epoch_leaves_out_few_images(num_images: int, batch_size: int, sizes: list[int]) -> None:
    assert np.diff(batch_bounds(num_images, batch_size)).tolist() == sizes


@pytest.mark.parametrize("num_images", range(2, 60))
def test_batches_are_nearly_equal_and_none_is_a_single_image(num_images: int) -> None:
    for batch_size in range(2, 70):
        sizes = np.diff(batch_bounds(num_images, batch_size))
        assert 2 <= sizes.min() <= sizes.max() <= batch_size
        assert sizes.max() - sizes.min() <= 1
        assert num_images - sizes.sum() <= max(1, MAX_LEFT_OUT * num_images)


@pytest.mark.parametrize(
    ("num_images", "batch_size"), [(26, 6), (27, 6), (7, 100), (9, 4), (300, 128), (43, 8), (85, 16)]
)
def test_images_to_be_mixed_come_in_even_batches(num_images: int, batch_size: int) -> None:
    bounds = batch_bounds(num_images, batch_size, even=True)
    assert not (np.diff(bounds) % 2).any()
    assert bounds[-1] >= num_images - max(1, MAX_LEFT_OUT * num_images)


@pytest.mark.parametrize(("num_images", "batch_size"), [(1, 128), (19, 1)])
def test_images_to_be_mixed_need_another_one(num_images: int, batch_size: int) -> None:
    with pytest.raises(ConfigError, match="need two images in a batch"):
        batch_bounds(num_images, batch_size, even=True)


def test_every_image_of_a_small_split_is_in_an_epoch() -> None:
    batches = _batches(_split(22), 12)
    epoch = list(batches.epoch(3))
    assert [batch.num_images for batch in epoch] == [len(batch.y_B) for batch in epoch] == [11, 11]
    assert sorted(position for batch in epoch for position in batch.positions) == list(range(22))
    assert [batches.num_images(steps) for steps in range(5)] == [0, 11, 22, 33, 44]


def test_parts_of_a_batch_join_to_the_whole() -> None:
    batches, groups = _batches(_split(22), 12), [Group(rank, 3) for rank in range(3)]
    for whole, *parts in zip(batches.epoch(0), *(batches.epoch(0, 0, group.shard) for group in groups), strict=True):
        assert np.array_equal(np.concatenate([part.positions for part in parts]), whole.positions)
        assert {part.num_images for part in parts} == {11}


def test_a_note_names_batches_that_are_not_full() -> None:
    assert _batches(_split(7), 100).note() == ""
    assert _batches(_split(101), 10).note() == ""
    assert _batches(_split(220), 128).note() == (
        "each epoch has 2 batches of 110 images, because full ones of 128 would leave out 92 of 220"
    )
    assert "5 batches of 5 or 6 images" in _batches(_split(26), 6).note()
