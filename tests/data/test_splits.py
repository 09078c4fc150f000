"""Split folders have many names: each is read, named as left out, or refused; none becomes a class."""

from __future__ import annotations

from pathlib import Path
from zlib import crc32

import pytest
from PIL import Image

from petune.base.errors import DataError
from petune.data.check import check_dataset
from petune.data.folder import load_folder
from petune.data.layout import list_split
from petune.data.lookup import count_classes


def _fill(root: Path, *classes: str, count: int = 3) -> None:
    """Write images of one color each, all different, so that none is a copy."""
    for name in classes:
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            color = crc32(f"{root}/{name}/{i}".encode()) % 2**24
            Image.new("RGB", (9, 9), color).save(root / name / f"{i}.png")


@pytest.mark.parametrize("name", ["val", "valid", "validation", "dev", "Validation", "val_set"])
def test_a_val_folder_alone_is_used_for_testing(name: str, tmp_path: Path) -> None:
    _fill(tmp_path / "train", "cat", "dog", count=4)
    _fill(tmp_path / name, "cat", "dog", count=2)
    data = load_folder(tmp_path, 32)
    assert (len(data.train), len(data.val), len(data.test)) == (8, 0, 4)
    assert "val is used for testing" in data.source


@pytest.mark.parametrize("name", ["test", "testing", "eval", "evaluation", "holdout", "hold-out", "Held_Out", "Test"])
@pytest.mark.parametrize("train", ["train", "training", "Train"])
def test_common_names_of_splits_are_read(name: str, train: str, tmp_path: Path) -> None:
    _fill(tmp_path / train, "cat", "dog")
    _fill(tmp_path / name, "cat", "dog", count=2)
    data = load_folder(tmp_path, 32)
    assert data.classes == ("cat", "dog")
    assert (len(data.train), len(data.val), len(data.test)) == (6, 0, 4)
    split, files, _ = list_split(tmp_path, "test")
    assert (split, files["cat"][0].parent) == ("test", tmp_path / name / "cat")


@pytest.mark.parametrize(
    "names",
    [
        ("train", "test"),
        ("train", "val", "test"),
        ("Train", "eval"),
        ("train", "test1"),
        ("train", "test", "misc"),
        ("training",),
        ("holdout",),
    ],
)
def test_loose_images_in_splits_do_not_make_classes(names: tuple[str, ...], tmp_path: Path) -> None:
    _fill(tmp_path, *names)
    for read in (
        lambda: load_folder(tmp_path, 32),
        lambda: check_dataset(f"folder:{tmp_path}"),
        lambda: count_classes(f"folder:{tmp_path}"),
        lambda: list_split(tmp_path, "test"),
    ):
        with pytest.raises(DataError, match=f"no class folders in .*{names[0]}/.*Sort the images into"):
            read()


def test_loose_images_in_one_split_are_refused(tmp_path: Path) -> None:
    _fill(tmp_path / "train", "cat", "dog")
    _fill(tmp_path, "test")
    for read in (load_folder, lambda path, _: list_split(path, "test")):
        with pytest.raises(DataError, match="no class folders in test/"):
            read(tmp_path, 32)


@pytest.mark.parametrize("classes", [("bus", "train"), ("invalid", "valid"), ("car", "crash-test", "train")])
def test_single_classes_may_have_names_of_splits(classes: tuple[str, ...], tmp_path: Path) -> None:
    _fill(tmp_path, *classes)
    assert load_folder(tmp_path, 32).classes == classes


def test_any_class_may_have_the_name_of_a_split_below_train(tmp_path: Path) -> None:
    _fill(tmp_path / "train", "test", "train", "val")
    assert load_folder(tmp_path, 32).classes == ("test", "train", "val")


def test_two_folders_of_one_split_are_refused(tmp_path: Path) -> None:
    for part in ("train", "val", "valid"):
        _fill(tmp_path / part, "cat", "dog")
    with pytest.raises(DataError, match="more than one val folder: val and valid"):
        load_folder(tmp_path, 32)


@pytest.mark.parametrize("name", ["test", "eval", "dev"])
def test_a_split_without_train_is_refused(name: str, tmp_path: Path) -> None:
    _fill(tmp_path / name, "cat", "dog")
    with pytest.raises(DataError, match=f"has {name}/ but no class folders in train/"):
        load_folder(tmp_path, 32)


USUAL_NAMES = [
    ("train_images", "test_images"),
    ("seg_train", "seg_test"),
    ("train_data", "test_data"),
    ("TrainData", "TestData"),
    ("traindata", "testdata"),
    ("trainImages", "testImages"),
    ("imagesTr", "imagesTs"),
    ("trn", "tst"),
    ("training_set", "test_set"),
    ("TRAIN", "TEST_IMAGES"),
    ("train2017", "test2017"),
    ("trainval", "test"),
]


@pytest.mark.parametrize("names", USUAL_NAMES)
def test_usual_names_of_splits_are_read(names: tuple[str, str], tmp_path: Path) -> None:
    train, test = names
    _fill(tmp_path / train, "cat", "dog")
    _fill(tmp_path / test, "cat", "dog", count=2)
    data = load_folder(tmp_path, 32)
    assert (data.classes, len(data.train), len(data.test)) == (("cat", "dog"), 6, 4)
    assert check_dataset(f"folder:{tmp_path}").images == {"train": {"cat": 3, "dog": 3}, "test": {"cat": 2, "dog": 2}}
    assert list_split(tmp_path, "test")[1]["cat"][0].parent == tmp_path / test / "cat"


@pytest.mark.parametrize("others", [(), ("misc",)])
@pytest.mark.parametrize("names", [*USUAL_NAMES, ("segtrain", "segtest"), ("trainA", "testA"), ("train", "test1")])
def test_loose_images_in_splits_with_usual_names_are_refused(
    names: tuple[str, str], others: tuple[str, ...], tmp_path: Path
) -> None:
    _fill(tmp_path, *names, *others)
    for read in (
        lambda: load_folder(tmp_path, 32),
        lambda: check_dataset(f"folder:{tmp_path}"),
        lambda: count_classes(f"folder:{tmp_path}"),
        lambda: list_split(tmp_path, "test"),
    ):
        with pytest.raises(DataError, match=f"{names[0]}.*put all class folders into train/"):
            read()


@pytest.mark.parametrize(
    "names",
    [
        ("test2", "train"),
        ("segtest", "segtrain"),
        ("testA", "testB", "trainA", "trainB"),
        ("cats_test", "dogs_train"),
        ("test1", "test2"),
    ],
)
def test_ambiguous_names_that_look_like_splits_are_refused(names: tuple[str, ...], tmp_path: Path) -> None:
    for part in names:
        _fill(tmp_path / part, "cat", "dog")
    for read in (load_folder, lambda path, _: check_dataset(f"folder:{path}")):
        with pytest.raises(DataError, match=f"unknown split folders in .*: {names[0]}.*Rename"):
            read(tmp_path, 32)


@pytest.mark.parametrize(
    "classes",
    [
        ("bus", "trains"),
        ("testudo", "turtle"),
        ("rejected", "validated"),
        ("evening", "morning"),
        ("airport", "train station"),
        ("test_negative", "test_positive"),
        ("contest", "restrain"),
        ("tr", "us"),
        ("device", "trainer"),
        ("trains", "testudo"),
    ],
)
def test_classes_whose_names_contain_a_split_are_read(classes: tuple[str, ...], tmp_path: Path) -> None:
    _fill(tmp_path, *classes)
    assert load_folder(tmp_path, 32).classes == tuple(sorted(classes))
    assert check_dataset(f"folder:{tmp_path}").is_sound


@pytest.mark.parametrize("names", [("train", "val"), ("train", "test"), ("TrainData", "TestData")])
def test_splits_inside_class_folders_are_refused(names: tuple[str, str], tmp_path: Path) -> None:
    for name in ("cats", "dogs"):
        _fill(tmp_path / name, *names)
    for read in (
        lambda: load_folder(tmp_path, 32),
        lambda: check_dataset(f"folder:{tmp_path}"),
        lambda: list_split(tmp_path, "test"),
    ):
        with pytest.raises(
            DataError, match=r"cats has splits in it: .*Move them above the class folders, as train/cats/"
        ):
            read()


def test_unlabeled_images_next_to_read_splits_are_left_out(tmp_path: Path) -> None:
    for part in ("seg_train", "seg_test"):
        _fill(tmp_path / part, "cat", "dog")
    _fill(tmp_path, "seg_pred")
    assert "left out: seg_pred/" in load_folder(tmp_path, 32).source


def test_what_is_left_out_is_named(tmp_path: Path) -> None:
    _fill(tmp_path / "train", "cat", "dog")
    assert "left out" not in load_folder(tmp_path, 32).source
    _fill(tmp_path, "unlabeled")
    for file in ("a.png", "train/b.png", "train/c.jpg"):
        (tmp_path / file).write_bytes(b"")
    expected = "left out: unlabeled/, 1 image outside class folders, 2 images directly in train/"
    assert expected in load_folder(tmp_path, 32).source
    assert check_dataset(f"folder:{tmp_path}").left_out == expected
    assert list_split(tmp_path, "test")[2] == expected
