"""Folds of cross-validation: each is the test split once, and the others are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from petune.base.errors import ConfigError, DataError
from petune.base.text import plural
from petune.data.cut import fold_numbers
from petune.data.dataset import CUT_TEST_NOTE, Dataset, Split
from petune.data.merge import joined
from petune.data.video.clips import Clips


def fold_of(dataset: Dataset, folds: int, fold: int) -> Dataset:
    """Return the dataset with one fold as its test split. The folds are the same for every seed.

    The folds are of the training split, together with a test split that petune cut from it. A test split of the
    dataset's own is not used, and its own val split still chooses the epoch.

    Args:
        dataset: Before a val split is cut.
        folds: Number of folds.
        fold: Which one is tested on, from 1.

    Raises:
        DataError: A fold is empty, or a class is missing in the training or test images of one.
        ConfigError: Several clips or crops of videos are asked for, and the dataset has a test split of its own.
    """
    pool = _pool(dataset)
    try:
        fold_N = fold_numbers(pool.samples(dataset.target.kind), folds, seed=0)
    except ValueError as error:
        raise DataError(f"{dataset.name} cannot be divided into {folds} folds: {error}. Use fewer folds") from None
    for number in range(folds):
        _check_fold(dataset, pool, fold_N == number, f"fold {number + 1} of {folds} of {dataset.name}")
    in_test = fold_N == fold - 1
    train, test = (pool.take(np.flatnonzero(mask)) for mask in (~in_test, in_test))
    test = _with_views(test, dataset)
    source = dataset.source.replace(CUT_TEST_NOTE, "")
    return replace(dataset, train=train, test=test, source=source).with_note(
        f"fold {fold} of {folds}, {plural(len(test), 'image')}"
    )


def _with_views(test: Split, dataset: Dataset) -> Split:
    """Return the test videos of a fold with the clips and crops that the dataset's tests have."""
    clips = dataset.test.images
    if not isinstance(clips, Clips) or len(clips.views) == 1:
        return test
    if not dataset.cut_test:
        raise ConfigError(
            f"folds divide the training videos of {dataset.name}, of which only one clip is tested. Leave test_clips "
            "and test_crops out"
        )
    return replace(test, images=clips, crop=dataset.test.crop)


def _check_fold(dataset: Dataset, pool: Split, in_test: NDArray[np.bool_], where: str) -> None:
    if not in_test.any() or in_test.all():
        raise DataError(f"{where} would be empty: there are too few images, or groups of images. Use fewer folds")
    everywhere = dataset.target.absent(pool.targets)  # classes that the dataset may lack
    for part, mask in (("test", in_test), ("training", ~in_test)):
        absent = [n for n in dataset.target.absent(pool.take(np.flatnonzero(mask)).targets) if n not in everywhere]
        if absent:
            names = ", ".join(absent[:5])
            raise DataError(
                f"{where} has no {part} image of {names}: the class has too few images, or groups. Use fewer folds"
            )


def _pool(dataset: Dataset) -> Split:
    """Return all images to divide: train, and test if petune cut it from them."""
    return pooled([dataset.train, dataset.test]) if dataset.cut_test else dataset.train


def pooled(splits: Sequence[Split]) -> Split:
    """Return one split of several that share their images."""
    first = splits[0]
    return replace(
        first,
        targets=first.targets if first.has_masks else np.concatenate([split.targets for split in splits]),
        rows=np.concatenate([split.rows for split in splits]),
        weights=joined(*(split.weights for split in splits)),
        groups=joined(*(split.groups for split in splits)),
        names=joined(*(split.names for split in splits)),
    )
