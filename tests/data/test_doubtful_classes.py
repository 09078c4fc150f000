"""Folders that are probably no classes: folds with the same classes, a folder around the splits, unlabeled images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
from PIL import Image

from petune.base.errors import DataError
from petune.data.check import check_dataset
from petune.data.folder import load_folder
from petune.data.layout import list_split

READS: list[Callable[[Path], Any]] = [
    lambda path: load_folder(path, 32),
    lambda path: check_dataset(f"folder:{path}"),
    lambda path: list_split(path, "test"),
]


def _fill(root: Path, *folders: str) -> None:
    """Write three images of one color each into each folder, all different."""
    for name in folders:
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(3):
            color = crc32(f"{name}/{i}".encode()) % 2**24
            Image.new("RGB", (9, 9), color).save(root / name / f"{i}.png")


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("folds", [("fold1", "fold2"), ("art", "photo", "sketch")])
def test_folders_that_repeat_in_each_class_are_taken_for_the_classes(
    folds: tuple[str, ...], read: Callable[[Path], Any], tmp_path: Path
) -> None:
    for fold in folds:
        _fill(tmp_path, f"{fold}/cat", f"{fold}/dog")
    _fill(tmp_path, f"{folds[0]}/rare")
    with pytest.raises(DataError, match=f"same folders of images in it: cat, dog.*folder:.*{folds[0]}.*into .*train"):
        read(tmp_path)


def test_they_may_be_parts_of_classes_below_train(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        _fill(tmp_path, f"train/{name}/left", f"train/{name}/right")
    assert load_folder(tmp_path, 32).classes == ("cat", "dog")


@pytest.mark.parametrize(
    "folders",
    [
        ("cat/images", "dog/images"),
        ("cat/persian", "cat/siamese", "dog/husky", "dog/poodle"),
        ("cat/day", "cat/night", "dog"),
        ("cat", "cat/day", "cat/night", "dog", "dog/day", "dog/night"),
    ],
)
def test_classes_with_folders_of_their_own_are_read(folders: tuple[str, ...], tmp_path: Path) -> None:
    _fill(tmp_path, *folders)
    assert load_folder(tmp_path, 32).classes == ("cat", "dog")


@pytest.mark.parametrize("read", READS)
def test_labeled_next_to_unlabeled_images_are_no_classes(read: Callable[[Path], Any], tmp_path: Path) -> None:
    _fill(tmp_path, "labeled/cat", "labeled/dog", "unlabeled")
    with pytest.raises(DataError, match=r"unlabeled/, which is no class.*use folder:.*/labeled"):
        read(tmp_path)


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("splits", [("data/train", "data/test"), ("images/train", "images/val")])
def test_a_folder_around_the_splits_is_named(
    splits: tuple[str, str], read: Callable[[Path], Any], tmp_path: Path
) -> None:
    for split in splits:
        _fill(tmp_path, f"{split}/cat", f"{split}/dog")
    (tmp_path / "__MACOSX").mkdir()
    around = tmp_path / splits[0].split("/")[0]
    with pytest.raises(DataError, match=f"Use folder:{around}, or"):
        read(tmp_path)
    assert load_folder(around, 32).classes == ("cat", "dog")


def test_a_folder_around_the_classes_is_named(tmp_path: Path) -> None:
    _fill(tmp_path, "data/cat", "data/dog")
    with pytest.raises(DataError, match=f"only one class folder .*use folder:{tmp_path}/data"):
        load_folder(tmp_path, 32)


@pytest.mark.parametrize("folder", ["", "train/"])
def test_a_class_with_the_name_of_a_split_is_noted(folder: str, tmp_path: Path) -> None:
    _fill(tmp_path, f"{folder}cat", f"{folder}dog", f"{folder}holdout")
    note = "class folder holdout/ has a split's name"
    assert note in load_folder(tmp_path, 32).source
    assert note in check_dataset(f"folder:{tmp_path}").doubtful_classes


def test_other_classes_are_not_noted(tmp_path: Path) -> None:
    _fill(tmp_path, "cat", "test_negative", "trainer", "valid_ticket")
    assert not check_dataset(f"folder:{tmp_path}").doubtful_classes
