"""Splits: stratified, stable, disjoint; inconsistent datasets are refused."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from petune.backbones.create import Backbone
from petune.base.errors import ConfigError, DataError, UnknownName
from petune.data import load_dataset
from petune.data.dataset import Dataset, Split, Target
from petune.data.digits import load_digits
from petune.data.registry import data_dir_or_default
from petune.runner.run_preprocess import choose_preprocess


def _dataset(per_class: tuple[int, ...] = (10, 20, 30), crop: float = 1.0) -> Dataset:
    labels = np.repeat(np.arange(len(per_class)), per_class)
    images = np.arange(len(labels), dtype=np.uint8)[:, None, None, None].repeat(3, 3)
    train = Split.of(images, labels, crop)
    target = Target("class", tuple("abcdefgh"[: len(per_class)]))
    return Dataset("toy", target, "here", "none", train, train.take(np.arange(0)), train.take(np.arange(2)))


def test_val_is_stratified_disjoint_and_complete() -> None:
    whole = _dataset()
    cut = whole.with_val(0.2, seed=0)
    assert np.bincount(cut.val.targets).tolist() == [2, 4, 6]
    assert np.bincount(cut.train.targets).tolist() == [8, 16, 24]
    assert sorted([*cut.train.rows, *cut.val.rows]) == list(range(60))
    for split in (cut.train, cut.val):
        assert np.array_equal(whole.train.targets[split.rows], split.targets)
        assert np.array_equal(split.images_at(np.arange(1, 3)), whole.train.images[split.rows[1:3]])
        assert len(split.images_at(slice(None))) == len(split)


def test_val_is_the_same_for_the_same_seed_only() -> None:
    rows = [_dataset().with_val(0.2, seed=seed).val.rows.tolist() for seed in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]


def test_the_val_split_is_stable_across_versions() -> None:
    assert _dataset((5, 5)).with_val(0.4, seed=0).val.rows.tolist() == [1, 2, 6, 9]


def test_copies_are_always_in_the_same_split() -> None:
    toy = _dataset()
    twice = replace(toy, train=replace(toy.train, rows=toy.train.rows // 2 * 2))  # each image and its copy
    for seed in range(5):
        cut = twice.with_val(0.2, seed)
        assert not set(cut.val.rows) & set(cut.train.rows)
        assert np.bincount(cut.val.targets).tolist() == [2, 4, 6]


def test_an_existing_val_split_is_kept() -> None:
    dataset = replace(_dataset(), val=_dataset().train.take(np.array([1, 2])))
    assert dataset.with_val(0.5, seed=0) is dataset


def test_a_class_with_one_image_gives_none_to_val() -> None:
    cut = _dataset((2, 1, 50)).with_val(0.1, seed=0)
    assert np.bincount(cut.val.targets, minlength=3).tolist() == [1, 0, 5]


def test_classes_missing_from_val_are_named() -> None:
    assert _dataset((2, 2, 50)).with_val(0.1, seed=0).source == _dataset().source
    assert _dataset((2, 1, 50)).with_val(0.1, seed=0).source.endswith("; no val image of b")


def test_a_val_split_that_would_be_empty_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"val_fraction=0\.5 of 2 training images"):
        _dataset((1, 1)).with_val(0.5, seed=0)


def test_few_shot_draws_the_same_count_from_each_class() -> None:
    few = _dataset().with_shots(4, seed=3)
    assert np.bincount(few.train.targets).tolist() == [4, 4, 4]
    assert few.train.rows.tolist() == _dataset().with_shots(4, seed=3).train.rows.tolist()
    assert few.train.rows.tolist() != _dataset().with_shots(4, seed=4).train.rows.tolist()
    assert np.array_equal(_dataset().train.targets[few.train.rows], few.train.targets)


def test_few_shot_images_do_not_come_from_val() -> None:
    cut = _dataset().with_val(0.2, seed=0)
    assert not set(cut.with_shots(8, seed=1).train.rows) & set(cut.val.rows)


def test_more_shots_than_images_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"shots is 11.*at most 10"):
        _dataset().with_shots(11, seed=0)


def test_cutting_keeps_the_margin() -> None:
    assert _dataset(crop=0.875).with_val(0.2, seed=0).val.crop == 0.875


def test_inconsistent_datasets_are_refused() -> None:
    good = _dataset()
    assert good.validated() is good
    with pytest.raises(DataError, match="At least two"):
        replace(good, target=Target("class", ("a",))).validated()
    with pytest.raises(DataError, match=r"toy/train: labels are 0\.\.2, outside 0\.\.1"):
        replace(good, target=Target("class", ("a", "b"))).validated()
    with pytest.raises(DataError, match="no training images for d"):
        replace(good, target=Target("class", tuple("abcd"))).validated()
    with pytest.raises(DataError, match="no test images"):
        replace(good, test=good.train.take(np.arange(0))).validated()


@pytest.mark.parametrize("dtype", [np.int32, np.uint64, np.bool_])
def test_classes_of_any_whole_type_become_int64(dtype: type) -> None:
    split = Split.of(np.zeros((20, 8, 8, 3), np.uint8), (np.arange(20) % 2).astype(dtype))
    dataset = Dataset("toy", Target("class", ("a", "b")), "here", "none", split, split.take(np.arange(0)), split)
    assert dataset.validated().train.targets.dtype == np.int64
    assert dataset.validated().train.targets.tolist() == [0, 1] * 10


def test_a_home_directory_in_the_environment_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PETUNE_DATA", "~/data")
    assert data_dir_or_default(None) == Path.home() / "data"


def test_statistics_are_those_of_the_pixels() -> None:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (40, 5, 5, 3), dtype=np.uint8)
    split = Split.of(images, np.zeros(40, dtype=np.int64)).take(np.arange(7, 40))
    mean, std = split.channel_statistics()
    np.testing.assert_allclose(mean, (images[7:] / 255).mean((0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(std, (images[7:] / 255).std((0, 1, 2)), atol=1e-6)


def test_statistics_need_little_memory() -> None:
    tracemalloc.start()
    images = np.random.default_rng(1).integers(0, 256, (200, 64, 64, 3), dtype=np.uint8)
    split = Split.of(images, np.zeros(200, dtype=np.int64))
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    mean, std = split.channel_statistics()
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert peak < 2 * images.nbytes  # all of them as float64 would be eight times as much
    pixels = images.reshape(-1, 3).astype(np.float32) / 255
    assert mean == tuple(round(float(m), 6) for m in pixels.mean(0, dtype=np.float64))
    assert std == tuple(round(float(s), 6) for s in pixels.std(0, dtype=np.float64))


def test_statistics_are_computed_only_if_the_weights_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []
    monkeypatch.setattr(Split, "channel_statistics", lambda self: counted.append(1) or ((0.1,) * 3, (0.2,) * 3))
    backbone = Backbone(nn.Identity(), "b", "b", "w", 8, (0.5,) * 3, (0.4,) * 3)
    assert choose_preprocess(backbone, _dataset()).std == (0.4,) * 3
    assert not counted
    assert choose_preprocess(replace(backbone, mean=None, std=None), _dataset()).mean == (0.1,) * 3


def test_digits_are_complete_and_stratified() -> None:
    digits = load_digits()
    assert (len(digits.train), len(digits.val), len(digits.test)) == (1438, 0, 359)
    assert digits.classes == tuple("0123456789")
    assert (digits.source, digits.augment) == ("scikit-learn", "shift")
    assert digits.train.images.shape == (1797, 8, 8, 3)
    assert (digits.train.images.min(), digits.train.images.max()) == (0, 255)
    assert not set(digits.train.rows) & set(digits.test.rows)
    counts = np.bincount(digits.test.targets) / (np.bincount(digits.train.targets) + np.bincount(digits.test.targets))
    assert np.abs(counts - 0.2).max() < 0.01
    assert digits.train.images[:, 0, 0].mean() < 1  # the paper around a digit is 0


def test_digits_are_the_same_every_time() -> None:
    assert np.array_equal(load_digits().test.rows, load_digits().test.rows)


def test_datasets_by_name(tmp_path: Path) -> None:
    assert load_dataset("digits").name == "digits"
    with pytest.raises(UnknownName, match="digits"):
        load_dataset("digit")
    with pytest.raises(DataError, match="no such folder"):
        load_dataset(f"folder:{tmp_path / 'nowhere'}")
