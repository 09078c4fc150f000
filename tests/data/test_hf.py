"""`hf:NAME_OR_DIR`: Parquet folders, folders of save_to_disk, streams, features of every kind, the Hub's refusals."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from petune.base.errors import DataError, MissingExtra
from petune.data import Dataset, load_dataset
from petune.data.lookup import dataset_target, find_dataset, manifest_of
from petune.data.manifest import changes
from tests.data.tables import digit
from tests.fake_hub import point_at, running

datasets = pytest.importorskip("datasets")
SHARED = Path("/work/shared/data")
NAMES = ["zero", "one", "two"]


@pytest.fixture(autouse=True)
def hf_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a cache for `datasets` of its own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    return tmp_path / "hf"


def images_of(count: int) -> list[Image.Image]:
    return [Image.fromarray(digit(i)) for i in range(count)]


def make(columns: dict[str, list[Any]], features: dict[str, Any]) -> Any:
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def labeled(count: int = 20) -> Any:
    label = [i % 3 for i in range(count)]
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)}
    return make({"image": images_of(count), "label": label}, features)


def load(path: Path, options: str = "") -> Dataset:
    return load_dataset(f"hf:{path}{options}", image_size=8)


@pytest.mark.skipif(not SHARED.exists(), reason="no shared data here")
@pytest.mark.parametrize("options", ["", ",streaming=true"])
def test_a_parquet_folder(options: str) -> None:
    dataset = load(SHARED / "sign_digits", options)
    assert dataset.classes == tuple("0123456789")
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (1651, 0, 411)
    assert load_dataset(f"table:{SHARED / 'sign_digits' / 'test.parquet'}", image_size=8).classes == dataset.classes
    assert dataset.test.names is not None
    assert dataset.test.names[3] == "test/3"


def test_progress_bars_are_not_written_to_a_pipe(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "parquet"
    folder.mkdir()
    labeled().to_parquet(folder / "train.parquet")
    capfd.readouterr()
    load(folder)
    assert capfd.readouterr().err == ""
    assert not datasets.are_progress_bars_disabled()


@pytest.mark.parametrize("several", [False, True])
def test_folders_of_save_to_disk(several: bool, tmp_path: Path) -> None:
    data = (
        datasets.DatasetDict({"train": labeled(), "validation": labeled(9), "extra": labeled(3)})
        if several
        else labeled()
    )
    data.save_to_disk(tmp_path / "saved")
    dataset = load(tmp_path / "saved")
    assert dataset.classes == tuple(NAMES)
    if several:
        assert (len(dataset.train), len(dataset.test)) == (20, 9)
        assert "splits not used: extra" in dataset.source
    else:
        assert len(dataset.train) + len(dataset.test) == 20


def test_pixels_follow_the_policy_of_files(tmp_path: Path) -> None:
    deep = Image.fromarray(digit(0).astype(np.uint16) * 257)
    palette = Image.fromarray(digit(0)).convert("P")
    images = [deep, palette, Image.fromarray(digit(0)), *images_of(6)]
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)}
    make({"image": images, "label": [0, 1, 2] * 3}, features).save_to_disk(tmp_path / "saved")
    dataset = load(tmp_path / "saved")
    pixels = {}
    for split in (dataset.train, dataset.test):
        pixels.update(
            {str(name): split.images[row].astype(int) for name, row in zip(split.names, split.rows, strict=True)}
        )
    first, second, third = (pixels[f"row {i}"] for i in range(3))
    assert np.abs(first - third).max() <= 1
    assert np.array_equal(second, third)


def test_features_decide_what_the_targets_are(tmp_path: Path) -> None:
    masks = [Image.fromarray((digit(i) // 86).astype(np.uint8)) for i in range(12)]
    class_label = datasets.ClassLabel(names=NAMES)
    cases: dict[str, tuple[Any, list[Any], str]] = {
        "tags": (datasets.List(class_label), [[i % 3, (i + 1) % 3] for i in range(12)], "multi_hot"),
        "label": (datasets.Value("string"), [NAMES[i % 3] for i in range(12)], "class"),
        "score": (datasets.Value("float32"), [i / 2 for i in range(12)], "number"),
        "annotation": (datasets.Image(), masks, "mask"),
        "breed": (class_label, [i % 3 for i in range(12)], "class"),
    }
    for name, (feature, values, kind) in cases.items():
        data = make({"image": images_of(12), name: values}, {"image": datasets.Image(), name: feature})
        data.save_to_disk(tmp_path / name)
        dataset = load(tmp_path / name)
        assert dataset.target.kind == kind, name
        assert dataset_target(f"hf:{tmp_path / name}") == dataset.target


def test_arrays(tmp_path: Path) -> None:
    features = {"pixels": datasets.Array2D((12, 12), "uint8"), "label": datasets.ClassLabel(names=NAMES)}
    data = make({"pixels": [digit(i) for i in range(12)], "label": [i % 3 for i in range(12)]}, features)
    data.save_to_disk(tmp_path / "saved")
    labeled(12).save_to_disk(tmp_path / "images")
    arrays, images = load(tmp_path / "saved").train, load(tmp_path / "images").train
    assert np.array_equal(arrays.images[arrays.rows], images.images[images.rows])


def test_several_labels_are_named(tmp_path: Path) -> None:
    two = {"fine": datasets.ClassLabel(names=NAMES), "coarse": datasets.ClassLabel(names=NAMES[:2])}
    columns = {"image": images_of(12), "fine": [i % 3 for i in range(12)], "coarse": [i % 2 for i in range(12)]}
    make(columns, {"image": datasets.Image(), **two}).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match="fine, coarse"):
        load(tmp_path / "saved")
    assert load(tmp_path / "saved", ",label=coarse").classes == ("zero", "one")
    with pytest.raises(DataError, match="Did you mean coarse"):
        load(tmp_path / "saved", ",label=course")


def test_splits_with_hidden_labels_are_left_out(tmp_path: Path) -> None:
    hidden = labeled(6).remove_columns("label").add_column("label", [-1] * 6).cast(labeled().features)
    datasets.DatasetDict({"train": labeled(), "validation": labeled(9), "test": hidden}).save_to_disk(
        tmp_path / "saved"
    )
    dataset = load(tmp_path / "saved")
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (20, 0, 9)
    assert "test not used: the labels are hidden" in dataset.source


def test_splits_of_other_classes_or_columns(tmp_path: Path) -> None:
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES[:2])}
    other = make({"image": images_of(6), "label": [0, 1] * 3}, features)
    datasets.DatasetDict({"train": labeled(), "test": other}).save_to_disk(tmp_path / "classes")
    with pytest.raises(DataError, match="other types or classes in test"):
        load(tmp_path / "classes")
    datasets.DatasetDict({"train": labeled(), "test": labeled().remove_columns("label")}).save_to_disk(
        tmp_path / "none"
    )
    with pytest.raises(DataError, match="split test has no column label"):
        load(tmp_path / "none")
    datasets.DatasetDict({"val": labeled(), "test": labeled()}).save_to_disk(tmp_path / "untrained")
    with pytest.raises(DataError, match="no split for training"):
        load(tmp_path / "untrained")


def test_a_stream_is_read_once(tmp_path: Path) -> None:
    labeled().to_parquet(tmp_path / "data" / "train.parquet")
    first = load(tmp_path / "data", ",streaming=true")
    assert load(tmp_path / "data").classes == first.classes
    labeled(30).to_parquet(tmp_path / "data" / "train.parquet")
    assert len(load(tmp_path / "data", ",streaming=true").train) > len(first.train)


def test_what_a_killed_stream_left_is_removed_by_the_next(tmp_path: Path, cache: Path) -> None:
    left = cache / "streams" / ".new-killed"
    left.mkdir(parents=True)
    (left / "train.parquet").write_bytes(b"a part")
    labeled().to_parquet(tmp_path / "data" / "train.parquet")
    assert len(load(tmp_path / "data", ",streaming=true").train)
    assert not list((cache / "streams").glob(".new-*"))


def test_the_manifest_changes_with_the_files(tmp_path: Path) -> None:
    labeled().to_parquet(tmp_path / "data" / "train.parquet")
    name = f"hf:{tmp_path / 'data'}"
    before = manifest_of(name)
    assert manifest_of(name) == before
    assert find_dataset(name) == str(tmp_path / "data")
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)}
    other = make({"image": images_of(21)[1:], "label": [i % 3 for i in range(20)]}, features)
    other.to_parquet(tmp_path / "data" / "train.parquet")
    assert changes(before, manifest_of(name))
    assert manifest_of(f"hf:{tmp_path / 'none'}") == {}


def test_a_dataset_with_capitals_is_found_in_the_cache(hf_cache: Path) -> None:
    (hf_cache / "Owner___my_pets").mkdir(parents=True)
    assert find_dataset("hf:Owner/MyPets", None) == str(hf_cache / "Owner___my_pets")
    assert find_dataset("hf:Owner/YourPets", None) is None


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        load(tmp_path / "none")
    Image.fromarray(digit(0)).save(tmp_path / "0.png")
    with pytest.raises(DataError, match="folder:"):
        load(tmp_path)
    with pytest.raises(DataError, match="is a file"):
        load(tmp_path / "0.png")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="cannot read hf:"):
        load(tmp_path / "bad")


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"petune\[data\]"):
        load(tmp_path)


def test_the_hub_is_asked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running() as hub:
        hub.repos = {"me/secret": {}, "me/open": {"x.txt": b""}}
        hub.private = {"me/secret"}
        point_at(hub.url, tmp_path, monkeypatch)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        for name in ("me/secret", "me/none"):
            with pytest.raises(DataError, match=r"no dataset me/.*HF_TOKEN"):
                load(Path(name))
        with pytest.raises(DataError, match="no revision 'old'"):
            load(Path("me/open"), ",revision=old")
        hub.gated = {"me/open"}
        with pytest.raises(DataError, match="needs a login"):
            load(Path("me/open"))
    with pytest.raises(DataError, match="cannot be reached"):
        load(Path("me/open"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match="HF_HUB_OFFLINE"):
        load(Path("me/open"))
