"""Images that do not fit the cache are decoded in every epoch, to the same bits as cached ones."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from petune.base.errors import DataError
from petune.data.batches import TrainBatches, eval_batches
from petune.data.cache import cached_split
from petune.data.dataset import Dataset
from petune.data.folder import load_folder
from petune.data.load import load_dataset
from petune.data.on_request import OnRequest
from petune.data.preprocess import Preprocess

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """24 JPEGs of noise in two classes, one of them twice."""
    generator = np.random.default_rng(0)
    for i in range(24):
        file = tmp_path / "images" / f"c{i % 2}" / f"{i:02}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (50, 60, 3), dtype=np.uint8)).save(file, quality=90)
    (tmp_path / "images" / "c0" / "copy.jpg").write_bytes((tmp_path / "images" / "c0" / "02.jpg").read_bytes())
    return tmp_path / "images"


def _both(folder: Path) -> tuple[Dataset, Dataset]:
    return load_folder(folder, 32, cache_gb=0), load_folder(folder, 32)


def test_a_limit_of_the_cache_is_kept(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PETUNE_CACHE", str(tmp_path / "cache"))
    on_request = load_dataset(
        f"folder:{folder}", image_size=32, cache_gb=100e3 / 1e9
    )  # 25 squares of 37 pixels: 103 kB
    assert isinstance(on_request.train.images, OnRequest)
    assert on_request.train.images.shape == (25, 37, 37, 3)
    assert "decoded in every epoch" in on_request.source
    assert sum(file.stat().st_size for file in (tmp_path / "cache").rglob("*") if file.is_file()) < 10_000
    cached = load_dataset(f"folder:{folder}", image_size=32, cache_gb=1.1e-4)
    assert isinstance(cached.train.images, np.memmap)
    again = load_dataset(f"folder:{folder}", image_size=32, cache_gb=0)  # what is cached already is used
    assert isinstance(again.train.images, np.memmap)


def test_a_full_disk_decodes_on_request(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: real._replace(free=1000))
    assert isinstance(load_folder(folder, 32).train.images, OnRequest)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: real._replace(free=500))
    with pytest.raises(DataError, match="507 bytes needed, 500 free"):  # images that cannot be read again
        cached_split({"images": "once"}, lambda allocate: (allocate(1, 13), np.zeros(1, np.int64)))


def test_rows_splits_and_statistics_are_the_same(folder: Path) -> None:
    on_request, cached = _both(folder)
    for name in ("train", "test"):
        a, b = getattr(on_request, name), getattr(cached, name)
        assert np.array_equal(a.rows, b.rows)
        assert np.array_equal(a.targets, b.targets)
        assert np.array_equal(a.images[a.rows], b.images[b.rows])
        assert np.array_equal(a.images[int(a.rows[0])], b.images[int(b.rows[0])])
        assert np.array_equal(a.images[2:4], b.images[2:4])
    assert len(np.unique(cached.train.rows)) < len(cached.train) or len(np.unique(cached.test.rows)) < len(cached.test)
    assert on_request.train.channel_statistics() == cached.train.channel_statistics()


@pytest.mark.parametrize("augment", ["none", "light", "crop", "randaug"])
def test_batches_are_the_same_to_the_bit(augment: str, folder: Path) -> None:
    preprocess = Preprocess(32, (0.5,) * 3, (0.5,) * 3)
    a, b = (TrainBatches(d.train, preprocess, augment, 7, 3, CPU) for d in _both(folder))
    for epoch in (0, 1):
        for mine, theirs in zip(a.epoch(epoch), b.epoch(epoch), strict=True):
            assert torch.equal(mine.x_BCHW, theirs.x_BCHW)
            assert torch.equal(mine.y_B, theirs.y_B)
    a_eval, b_eval = (list(eval_batches(d.test, preprocess, 2, CPU)) for d in _both(folder))
    for mine, theirs in zip(a_eval, b_eval, strict=True):
        assert torch.equal(mine.x_BCHW, theirs.x_BCHW)


@pytest.mark.parametrize("cache_gb", [0.0, 1.0])
def test_a_broken_image_is_found_before_training(cache_gb: float, folder: Path) -> None:
    (folder / "c1" / "03.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"03\.jpg"):
        load_folder(folder, 32, cache_gb=cache_gb)


def test_broken_images_are_skipped(folder: Path) -> None:
    for i in range(200):  # one of 225 is less than 1 %
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / "c1" / f"plain-{i}.png")
    (folder / "c1" / "03.jpg").write_bytes(b"no image")
    a, b = (load_folder(folder, 32, "skip", cache_gb) for cache_gb in (0.0, 1.0))
    assert "03.jpg" in a.source
    assert isinstance(a.train.images, OnRequest)
    assert np.array_equal(a.train.rows, b.train.rows)


def test_an_image_that_broke_after_it_was_checked_is_named(folder: Path) -> None:
    dataset = load_folder(folder, 32, cache_gb=0)
    file = Path(str(dataset.train.names[0])) if dataset.train.names is not None else folder
    file.unlink()
    batches: Any = TrainBatches(dataset.train, Preprocess(32, (0.5,) * 3, (0.5,) * 3), "crop", 8, 0, CPU).epoch(0)
    with pytest.raises(DataError, match=file.name):
        list(batches)
