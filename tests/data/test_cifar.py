"""CIFAR from Parquet, from torchvision's archive, and from an unreachable server; the real files if present."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image

from petune.base.errors import DataError
from petune.data import load_dataset
from petune.data.cifar import load_cifar

NAMES = [f"class{i}" for i in range(10)]
REAL = Path(os.environ.get("PETUNE_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")


def _images(count: int, seed: int = 0, side: int = 32) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def _png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _write(path: Path, images: list[bytes], labels: list[int], column: str = "label", named: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"bytes": content, "path": "x.png"} for content in images]
    table = pa.table({"img": rows, column: labels})
    if named:
        info = {"info": {"features": {column: {"names": NAMES, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({b"huggingface": json.dumps(info).encode()})
    pq.write_table(table, path)


def _layout(root: Path, images: NDArray[np.uint8], named: bool = True) -> None:
    labels = [i % 10 for i in range(len(images))]
    content = [_png(image) for image in images]
    _write(root / "cifar10" / "train.parquet", content, labels, named=named)
    _write(root / "cifar10" / "test.parquet", content[::-1], labels[::-1], named=named)


def test_parquet_is_read_to_the_pixel(tmp_path: Path) -> None:
    images = _images(20)
    _layout(tmp_path, images)
    data = load_cifar("cifar10", tmp_path)
    assert np.array_equal(data.train.images, images)
    assert np.array_equal(data.test.images, images[::-1])
    assert data.train.targets.tolist() == [i % 10 for i in range(20)]
    assert data.classes == tuple(NAMES)
    assert data.augment == "light"
    assert isinstance(data.train.images, np.memmap)


def test_sharded_parquet_is_read_in_order(tmp_path: Path) -> None:
    images = _images(20)
    content, labels = [_png(image) for image in images], [i % 10 for i in range(20)]
    for start in (0, 10):
        name = f"train-{start // 10:05}-of-00002.parquet"
        _write(tmp_path / "cifar10" / "data" / name, content[start : start + 10], labels[start : start + 10])
    _write(tmp_path / "cifar10" / "data" / "test-00000-of-00001.parquet", content, labels)
    assert np.array_equal(load_cifar("cifar10", tmp_path).train.images, images)


def test_without_names_the_classes_are_numbers(tmp_path: Path) -> None:
    _layout(tmp_path, _images(10), named=False)
    assert load_cifar("cifar10", tmp_path).classes == tuple("0123456789")


def test_petune_data_names_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _layout(tmp_path, _images(10))
    monkeypatch.setenv("PETUNE_DATA", str(tmp_path))
    assert len(load_dataset("cifar10").train) == 10


def test_decoding_is_cached_until_the_file_changes(tmp_path: Path, cache: Path) -> None:
    _layout(tmp_path, _images(10))
    load_cifar("cifar10", tmp_path)
    before = {p: p.stat().st_mtime_ns for p in cache.glob("decoded/*/images.npy")}
    load_cifar("cifar10", tmp_path)
    assert {p: p.stat().st_mtime_ns for p in cache.glob("decoded/*/images.npy")} == before
    _layout(tmp_path, _images(10, seed=1))
    assert np.array_equal(load_cifar("cifar10", tmp_path).train.images, _images(10, seed=1))


@pytest.mark.parametrize("damage", [b"", b"not numpy", None])
def test_a_damaged_cache_is_decoded_again(damage: bytes | None, tmp_path: Path, cache: Path) -> None:
    images = _images(10)
    _layout(tmp_path, images)
    load_cifar("cifar10", tmp_path)
    for file in cache.glob("decoded/*/images.npy"):
        file.write_bytes(file.read_bytes()[:500] if damage is None else damage)
    assert np.array_equal(load_cifar("cifar10", tmp_path).train.images, images)


def test_a_failed_decode_leaves_nothing_in_the_cache(tmp_path: Path, cache: Path) -> None:
    _layout(tmp_path, _images(10))
    _write(tmp_path / "cifar10" / "train.parquet", [_png(_images(1)[0])[:-30]] * 10, list(range(10)))
    with pytest.raises(DataError):
        load_cifar("cifar10", tmp_path)
    assert [p.name for p in (cache / "decoded").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no image", "image 0 is not"),
        (_png(_images(1, side=31)[0]), "image 0 is not .*31x31"),
    ],
)
def test_a_broken_or_wrongly_sized_image_is_an_error(content: bytes, message: str, tmp_path: Path) -> None:
    _layout(tmp_path, _images(10))
    _write(tmp_path / "cifar10" / "train.parquet", [content] * 10, list(range(10)))
    with pytest.raises(DataError, match=message):
        load_cifar("cifar10", tmp_path)


def test_an_invalid_parquet_file_is_reported(tmp_path: Path) -> None:
    _layout(tmp_path, _images(10))
    (tmp_path / "cifar10" / "train.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match=r"train\.parquet is not a Parquet file"):
        load_cifar("cifar10", tmp_path)


def test_parquet_without_the_label_column_is_refused(tmp_path: Path) -> None:
    _layout(tmp_path, _images(10))
    _write(tmp_path / "cifar10" / "train.parquet", [_png(_images(1)[0])], [0], column="other")
    with pytest.raises(DataError, match="'label' column"):
        load_cifar("cifar10", tmp_path)


def _batch(count: int) -> bytes:
    pixels = _images(count).transpose(0, 3, 1, 2).reshape(count, -1)
    return pickle.dumps({"data": pixels, "labels": [i % 10 for i in range(count)], "batch_label": "x"})


def test_a_folder_with_a_wrong_md5_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        (folder / name).write_bytes(_batch(10))
    with pytest.raises(DataError, match="not the published cifar10 archive"):
        load_cifar("cifar10", tmp_path)


def test_a_wrong_archive_is_refused_before_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise OSError("no network in tests")

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", no_network)
    content = io.BytesIO(b"x")
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
        entry = tarfile.TarInfo("../escaped.txt")
        entry.size = 1
        archive.addfile(entry, content)
    with pytest.raises(DataError, match=r"cifar-10-python\.tar\.gz is not the published cifar10 archive"):
        load_cifar("cifar10", tmp_path)
    assert not (tmp_path.parent / "escaped.txt").exists()
    assert not (tmp_path / "cifar-10-batches-py").exists()


def test_the_published_archive_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    files = {name: _batch(10) for name in names} | {"batches.meta": pickle.dumps({"label_names": NAMES})}
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5((tmp_path / "cifar-10-python.tar.gz").read_bytes()).hexdigest())
    monkeypatch.setattr(CIFAR10, "train_list", [[n, md5[n]] for n in names[:5]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": md5["batches.meta"]})
    data = load_cifar("cifar10", tmp_path)
    assert (len(data.train), len(data.test), data.classes) == (50, 10, tuple(NAMES))
    assert np.array_equal(data.test.images, _images(10))


def test_an_unreachable_download_is_an_error_within_three_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import CIFAR10

    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(CIFAR10, "url", "http://192.0.2.1/cifar-10-python.tar.gz")
    start = time.perf_counter()
    with pytest.raises(DataError) as caught:
        load_cifar("cifar10", tmp_path)
    assert time.perf_counter() - start < 3
    for part in ("cifar-10-python.tar.gz", str(tmp_path), "192.0.2.1", "data_dir", "PETUNE_DATA"):
        assert part in str(caught.value)
    assert "--data-dir" in caught.value.cli_hint


@pytest.mark.exhaustive
@pytest.mark.skipif(not (REAL / "cifar100" / "test.parquet").exists(), reason="CIFAR is not in PETUNE_DATA")
def test_the_real_cifar100_test_file(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "cifar100"
    folder.mkdir(parents=True)
    for part in ("train", "test"):  # the test file twice: decoding all 50,000 would take too long here
        (folder / f"{part}.parquet").symlink_to(REAL / "cifar100" / "test.parquet")
    data = load_cifar("cifar100", tmp_path / "data")
    assert len(data.test) == 10_000
    assert np.bincount(data.test.targets).tolist() == [100] * 100
    assert (data.classes[0], data.classes[1], data.classes[99]) == ("apple", "aquarium_fish", "worm")
    mean, std = data.test.channel_statistics()
    np.testing.assert_allclose(mean, (0.5088, 0.4874, 0.4419), atol=2e-3)
    np.testing.assert_allclose(std, (0.2683, 0.2574, 0.2771), atol=2e-3)
