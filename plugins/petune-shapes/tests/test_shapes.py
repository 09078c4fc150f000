"""Shapes meet petune's contract of datasets, and each target describes its image."""

import numpy as np
import pytest

import petune

TARGETS = ["shape", "labels", "size", "mask"]


@pytest.mark.parametrize("target", TARGETS)
def test_contract(target):
    petune.check_dataset(f"shapes,target={target},count=60")


def test_the_mask_covers_the_bright_pixels():
    split = petune.load_dataset("shapes,target=mask,count=60").train
    bright = split.images[split.rows].min(-1) >= 120
    assert np.array_equal(bright, split.targets_at(np.arange(len(split))) > 0)


def test_the_size_is_the_width_of_the_shape():
    split = petune.load_dataset("shapes,target=size,count=60").train
    widths = (split.images[split.rows].min(-1) >= 120).any(1).sum(1)
    assert np.abs(widths - split.targets[:, 0]).max() <= 1.5


def test_one_to_three_labels():
    targets = petune.load_dataset("shapes,target=labels,count=60").train.targets
    assert set(targets.sum(1).tolist()) == {1, 2, 3}


def test_another_seed_draws_other_images():
    first, second = (petune.load_dataset(f"shapes,count=60,seed={seed}").train.images for seed in (0, 1))
    assert not np.array_equal(first, second)
