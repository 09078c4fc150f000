"""A download that was cut short is fetched again, and what is unpacked once is used as it is."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from petune.data import load_dataset
from petune.data.torchvision_files import files_state
from petune.data.torchvision_table import TABLE
from tests.data.test_medmnist import _write as write_medmnist

CLASSES = ("AnnualCrop", "Forest", "River")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a cache of petune that nothing was downloaded to, with a network."""
    monkeypatch.setenv("PETUNE_CACHE", str(tmp_path / "cache"))
    for module in ("torchvision_files", "readers.medmnist"):
        monkeypatch.setattr(f"petune.data.{module}.reachable", lambda url: True)
    return tmp_path / "cache"


def test_a_dataset_of_torchvision_is_fetched_again_from_the_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    unpacked: list[int] = []

    def unpack(url: str, download_root: str, **options: Any) -> None:
        unpacked.append(len(unpacked))
        for number, name in enumerate(CLASSES):
            folder = Path(download_root) / "2750" / name
            folder.mkdir(parents=True)
            for i in range(6):
                Image.new("RGB", (8, 8), (40 * number, i, 0)).save(folder / f"{name}_{i}.jpg")
            if len(unpacked) == 1 and number == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr("torchvision.datasets.eurosat.download_and_extract_archive", unpack)
    with pytest.raises(KeyboardInterrupt):
        load_dataset("torchvision:EuroSAT", image_size=8)
    for _ in range(2):
        dataset = load_dataset("torchvision:EuroSAT", image_size=8)
        assert dataset.classes == CLASSES
        assert len(dataset.train) + len(dataset.test) == 18
    assert len(unpacked) == 2


def test_a_file_of_medmnist_is_found_only_when_it_is_complete(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[str] = []

    def fetch(url: str, root: str, filename: str, md5: str) -> None:
        tries.append(url)
        write_medmnist(Path(root) / filename, 9, color=True)
        if len(tries) == 1:
            (Path(root) / filename).write_bytes(b"PK\x03\x04 and no more")
            raise KeyboardInterrupt

    monkeypatch.setattr("torchvision.datasets.utils.download_url", fetch)
    with pytest.raises(KeyboardInterrupt):
        load_dataset("medmnist:pathmnist")
    assert len(load_dataset("medmnist:pathmnist").train) == 18
    assert len(tries) == 2
    assert [path.name for path in (cache / "data/medmnist").iterdir()] == ["pathmnist.npz"]


def test_packed_files_are_unpacked_and_decoded_once(cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "datasets" / "fashion-mnist"
    folder.mkdir(parents=True)
    for part, count in (("train", 40), ("t10k", 20)):
        pixels = np.random.default_rng(count).integers(0, 256, count * 784, np.uint8)
        with gzip.open(folder / f"{part}-images-idx3-ubyte.gz", "wb") as file:
            file.write(struct.pack(">iiii", 2051, count, 28, 28) + pixels.tobytes())
        with gzip.open(folder / f"{part}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(struct.pack(">ii", 2049, count) + bytes(i % 10 for i in range(count)))
    first = load_dataset("torchvision:FashionMNIST", tmp_path / "datasets").train.images
    decoded = sorted((cache / "decoded").iterdir())
    assert np.array_equal(load_dataset("torchvision:FashionMNIST", tmp_path / "datasets").train.images, first)
    assert sorted((cache / "decoded").iterdir()) == decoded


def test_other_files_next_to_a_dataset_that_is_a_file_change_nothing(tmp_path: Path) -> None:
    for name in ("usps.bz2", "usps.t.bz2"):
        (tmp_path / name).write_bytes(name.encode())
    before = files_state(tmp_path, TABLE["USPS"])
    (tmp_path / "pets").mkdir()
    (tmp_path / "pets" / "dead.jpg").symlink_to(tmp_path / "nowhere")
    assert files_state(tmp_path, TABLE["USPS"]) == before
    (tmp_path / "usps.t.bz2").write_bytes(b"another")
    assert files_state(tmp_path, TABLE["USPS"]) != before
