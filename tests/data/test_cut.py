"""Dividing samples: as before for classes, evenly for other targets, and groups and copies never part."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from petune.base.errors import ConfigError, DataError
from petune.data.cut import Samples, held_out
from petune.data.dataset import Dataset, Split, Target
from petune.data.digits import load_digits


def digest(positions: NDArray[np.int64]) -> str:
    return hashlib.sha256(np.ascontiguousarray(positions, np.int64).tobytes()).hexdigest()[:16]


def test_the_splits_of_plain_classes_are_those_of_earlier_versions() -> None:
    generator = np.random.default_rng(7)
    digests = []
    for count, classes in ((60, 3), (997, 10), (40, 12)):
        labels, rows = generator.integers(0, classes, count), np.arange(count)
        copies = generator.integers(0, count, count // 5)
        rows[copies] = rows[copies] // 2
        for fraction in (0.1, 0.35, 0.9):
            digests.append(digest(np.flatnonzero(held_out(Samples("class", labels, rows), fraction, seed=3))))
    assert digests == [
        *("eb07a44376c318de", "b7b9826f50f58273", "92c3b836ab154867"),
        *("eee93c45b982cb8d", "57ff8a2f4d3eed1b", "c5d2c8a9f32b41f6"),
        *("3958b67f1eefb01d", "2019dd1b513a613c", "e2a6c3312e9cb4bf"),
    ]
    digits = load_digits()
    cut = digits.with_val(0.1, seed=0)
    assert [digest(split.rows) for split in (digits.test, cut.val, cut.with_shots(5, seed=2).train)] == [
        *("734db0f83640ae3e", "4a7762264f662e44", "9f315499028076d9")
    ]


def test_groups_and_copies_stay_together_and_every_class_is_on_both_sides() -> None:
    generator = np.random.default_rng(0)
    for seed in range(20):
        groups = generator.integers(0, 40, 400)
        labels = (groups + generator.integers(0, 2, 400)) % 4  # a group has samples of two classes
        rows = np.arange(400)
        rows[::50] = rows[1::50]  # a copy in another group joins the two
        mask = held_out(Samples("class", labels, rows, groups), 0.2, seed)
        assert not {*groups[mask]} & {*groups[~mask]}
        assert not {*rows[mask]} & {*rows[~mask]}
        assert {*labels[mask]} == {*labels[~mask]} == {0, 1, 2, 3}
        assert 0.12 < mask.mean() < 0.3


def test_one_large_group_does_not_become_the_whole_test_split() -> None:
    groups = np.array([0] * 60 + [*range(1, 41)])
    samples = Samples("class", np.zeros(100, np.int64), np.arange(100), groups)
    assert all(held_out(samples, 0.2, seed).sum() == 20 for seed in range(10))


def test_a_single_group_is_not_divided() -> None:
    groups = np.zeros(10, np.int64)
    assert not held_out(Samples("class", np.arange(10) % 2, np.arange(10), groups), 0.2, seed=0).any()


def test_combinations_of_labels_are_stratified_and_rare_ones_do_not_inflate_the_share() -> None:
    generator = np.random.default_rng(1)
    targets = (generator.random((500, 12)) < 0.25).astype(np.uint8)  # nearly every combination is unique
    mask = held_out(Samples("multi_hot", targets, np.arange(500)), 0.2, seed=0)
    assert abs(mask.mean() - 0.2) < 0.02
    shares = targets[mask].sum(0) / targets.sum(0)
    assert np.abs(shares - 0.2).max() < 0.12
    common = np.tile(np.eye(2, dtype=np.uint8), (50, 1))
    mask = held_out(Samples("multi_hot", common, np.arange(100)), 0.2, seed=0)
    assert common[mask].sum(0).tolist() == [10, 10]


@pytest.mark.parametrize("grouped", [False, True])
def test_a_label_of_few_images_keeps_one_for_training(grouped: bool) -> None:
    labels = np.zeros((120, 14), np.uint8)
    labels[::2, 0] = labels[::3, 1] = 1
    for rare in range(12):
        labels[7 + 9 * rare, 2 + rare] = 1
    groups = np.arange(120) // 2 if grouped else None
    for seed in range(10):
        held = held_out(Samples("multi_hot", labels, np.arange(120), groups), 0.2, seed)
        assert labels[~held].any(0).all()
        assert held.any()


def test_a_class_within_groups_of_others_keeps_one_for_training() -> None:
    labels = np.repeat([0, 0, 0, 1, 2], 20)
    groups = np.arange(100) % 5 + 5 * (np.arange(100) // 50)
    for seed in range(20):
        held = held_out(Samples("class", labels, np.arange(100), groups), 0.5, seed)
        assert {*labels[~held]} == {0, 1, 2}


def test_numbers_are_stratified_by_quantile() -> None:
    targets = np.random.default_rng(2).lognormal(0, 2, (300, 1))
    for seed in range(5):
        mask = held_out(Samples("number", targets, np.arange(300)), 0.2, seed)
        ranks = np.argsort(np.argsort(targets[:, 0]))[mask]
        assert mask.sum() == 60
        assert np.bincount(ranks // 30).tolist() == [6] * 10


def test_masks_are_divided_at_random() -> None:
    masks = np.zeros((50, 4, 4), np.uint8)
    mask = held_out(Samples("mask", masks, np.arange(50)), 0.2, seed=0)
    assert mask.sum() == 10


def dataset(target: Target, targets: NDArray[np.generic]) -> Dataset:
    images = np.zeros((len(targets), 2, 2, 3), np.uint8)
    whole = Split.of(images, targets)
    empty = whole.take(np.arange(0))
    return Dataset("toy", target, "here", "none", whole, empty, empty)


KINDS = {
    "class": (Target("class", ("a", "b")), np.arange(40) % 2),
    "multi_hot": (Target("multi_hot", ("a", "b")), np.tile(np.eye(2, dtype=np.uint8), (20, 1))),
    "number": (Target("number", ("age", "size")), np.random.default_rng(3).normal(size=(40, 2))),
    "mask": (Target("mask", ("a", "b")), np.tile(np.array([0, 1, 255], np.uint8), (40, 3, 1))),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_target_is_cut_and_keeps_its_targets_weights_and_groups(kind: str) -> None:
    whole = dataset(*KINDS[kind])
    more = {"weights": np.linspace(0, 1, 40), "groups": np.arange(40) // 2}
    cut = replace(whole, train=replace(whole.train, **more)).with_test().with_val(0.25, seed=0).validated()
    assert len(cut.train) + len(cut.val) + len(cut.test) == 40
    for split in (cut.train, cut.val, cut.test):
        positions = np.arange(len(split))
        assert np.array_equal(split.targets_at(positions), KINDS[kind][1][split.rows])
        assert split.weights is not None
        assert split.groups is not None
        assert np.array_equal(split.weights, more["weights"][split.rows])
        assert np.array_equal(split.groups, split.rows // 2)


def test_shots_are_drawn_per_label_and_refused_without_classes() -> None:
    few = dataset(*KINDS["multi_hot"]).with_shots(3, seed=0)
    assert few.train.targets.sum(0).tolist() == [3, 3]
    with pytest.raises(ConfigError, match="shots counts images per class"):
        dataset(*KINDS["number"]).with_shots(3, seed=0)


WRONG = {
    "not finite": (Target("number", ("age",)), np.array([[1.0], [np.nan]]), "1 target not finite.*image 1: age is nan"),
    "columns": (Target("number", ("age",)), np.ones((2, 2)), "2 columns of targets, but 1 name"),
    "values": (Target("multi_hot", ("a", "b")), np.full((2, 2), 2, np.uint8), "other values than 0 and 1"),
    "shape": (Target("class", ("a", "b")), np.zeros((2, 1), np.int64), "1 dimension, not shape"),
    "mask": (Target("mask", ("a", "b")), np.full((2, 3, 3), 7, np.uint8), "labels are 7..7, outside 0..1"),
    "absent": (Target("multi_hot", ("a", "b")), np.eye(2, dtype=np.uint8)[[0, 0]], "no training images for b"),
}


@pytest.mark.parametrize(("target", "targets", "message"), WRONG.values(), ids=WRONG)
def test_wrong_targets_are_refused(target: Target, targets: NDArray[np.generic], message: str) -> None:
    whole = dataset(target, targets)
    with pytest.raises(DataError, match=message):
        replace(whole, test=whole.train).validated()


def test_a_group_in_two_splits_and_odd_weights_are_refused() -> None:
    whole = dataset(*KINDS["class"])
    grouped = replace(whole.train, groups=np.arange(40))
    with pytest.raises(DataError, match="group 0 is in train and in test"):
        replace(whole, train=grouped, test=grouped.take(np.arange(1))).validated()
    for weights, message in ((np.full(40, np.nan), "not finite"), (np.ones(3), "weights of shape")):
        with pytest.raises(DataError, match=message):
            replace(whole, train=replace(whole.train, weights=weights), test=whole.train).validated()
