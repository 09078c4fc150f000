"""CIFAR's archive, its unpacked folder and Parquet, damaged everywhere: the data, or one error; the file is kept."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, seed, settings, strategies as st
from PIL import Image
from torchvision.datasets import CIFAR10

from petune.base.errors import DataError
from petune.data.cifar import load_cifar
from petune.data.dataset import Dataset
from tests.faults.conftest import tally, tries

GZ, FOLDER = "cifar-10-python.tar.gz", "cifar-10-batches-py"
BATCHES = ("data_batch_1", "data_batch_2", "test_batch", "batches.meta")
SETTINGS = settings(
    max_examples=tries(40, 500),
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
DAMAGE = st.lists(
    st.tuples(
        st.sampled_from(["bit", "cut", "gone", "more"]), st.floats(0, 1, exclude_max=True), st.binary(max_size=9)
    ),
    min_size=1,
    max_size=4,
)


def damaged(content: bytes, harms: list[tuple[str, float, bytes]]) -> bytes:
    """The bytes with a bit flipped, the end cut off, a piece taken out or put in, one after the other."""
    data = bytearray(content)
    for how, where, piece in harms:
        at = int(where * len(data))
        if how == "bit" and data:
            data[at] ^= 1 << (len(piece) % 8)
        elif how == "cut":
            del data[at:]
        elif how == "gone":
            del data[at : at + 1 + len(piece)]
        else:
            data[at:at] = piece
    return bytes(data)


def pixels(count: int, number: int) -> Any:
    return np.random.default_rng(number).integers(0, 256, (count, 3072), dtype=np.uint8)


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small archive and folder that torchvision's MD5s say to be the published ones; a network that is up."""
    (tmp_path / FOLDER).mkdir()
    for number, name in enumerate(BATCHES[:3]):
        batch = {"data": pixels(10, number), "labels": list(range(10))}
        (tmp_path / FOLDER / name).write_bytes(pickle.dumps(batch, protocol=2))
    (tmp_path / FOLDER / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}, protocol=2))
    with tarfile.open(tmp_path / GZ, "w:gz") as archive:
        archive.add(tmp_path / FOLDER, FOLDER)
    md5 = {name: hashlib.md5((tmp_path / FOLDER / name).read_bytes()).hexdigest() for name in BATCHES}
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5((tmp_path / GZ).read_bytes()).hexdigest())
    monkeypatch.setattr(CIFAR10, "train_list", [[n, md5[n]] for n in BATCHES[:2]])
    monkeypatch.setattr(CIFAR10, "test_list", [[BATCHES[2], md5[BATCHES[2]]]])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": BATCHES[3], "key": "label_names", "md5": md5[BATCHES[3]]})
    monkeypatch.setattr("petune.data.cifar.reachable", lambda url: True)
    monkeypatch.setattr("torchvision.datasets.utils.download_url", lambda *words: pytest.fail(f"download {words}"))
    return tmp_path


def is_the_published(data: Dataset) -> bool:
    expected = pixels(10, 2).reshape(10, 3, 32, 32).transpose(0, 2, 3, 1)
    return len(data.train) == 20 and np.array_equal(data.test.images, expected) and data.classes[9] == "j"


def test_a_damaged_archive(published: Path) -> None:
    good, outcome, own = (published / GZ).read_bytes(), [0, 0], published / "own"
    own.mkdir()

    @seed(1)
    @SETTINGS
    @given(harms=DAMAGE)
    def each(harms: list[tuple[str, float, bytes]]) -> None:
        content = damaged(good, harms)
        (own / GZ).write_bytes(content)
        outcome[0] += 1
        try:
            outcome[1] += is_the_published(load_cifar("cifar10", own)) and content == good
        except DataError as error:
            outcome[1] += f"{own / GZ} is not the published cifar10 archive" in str(error)
        assert {p.name: p.read_bytes() for p in own.iterdir()} == {GZ: content}  # the user's file, as it was

    each()
    tally("CIFAR's archive with changed bytes, network available", "one error; file kept, no download", *outcome)


def test_an_unpacking_that_was_cut_short(published: Path) -> None:
    good, outcome, own = (published / FOLDER), [0, 0], published / "own"

    @seed(2)
    @SETTINGS
    @given(harms=DAMAGE, name=st.sampled_from(BATCHES), missing=st.sets(st.sampled_from(BATCHES)), packed=st.booleans())
    def each(harms: list[tuple[str, float, bytes]], name: str, missing: set[str], packed: bool) -> None:
        shutil.rmtree(own, ignore_errors=True)
        shutil.copytree(good, own / FOLDER)
        (own / FOLDER / name).write_bytes(damaged((good / name).read_bytes(), harms))
        for file in missing:
            (own / FOLDER / file).unlink()
        whole = packed or all((own / FOLDER / n).exists() for n in BATCHES)
        if packed:
            shutil.copy(published / GZ, own / GZ)
        outcome[0] += 1
        try:
            outcome[1] += is_the_published(load_cifar("cifar10", own)) and whole
        except DataError as error:
            outcome[1] += not packed and f"{own / FOLDER} is not the published cifar10" in str(error)

    each()
    tally("CIFAR's folder, damaged or partly unpacked", "the archive is read instead, or one error", *outcome)


def test_a_damaged_download_is_fetched_again(
    published: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("PETUNE_CACHE", str(cache))
    (cache / "data").mkdir()
    (cache / "data" / GZ).write_bytes((published / GZ).read_bytes()[:1000])  # a download that was killed
    urls: list[object] = []

    def download(url: str, root: Path, filename: str, md5: str) -> None:
        urls.append(url)
        shutil.copy(published / GZ, root / filename)

    monkeypatch.setattr("torchvision.datasets.utils.download_url", download)
    assert is_the_published(load_cifar("cifar10", None))
    assert is_the_published(load_cifar("cifar10", None))
    assert urls == [CIFAR10.url]


def parquet(count: int) -> bytes:
    rows = []
    for number in range(count):
        buffer = io.BytesIO()
        Image.fromarray(pixels(1, number).reshape(32, 32, 3)).save(buffer, "PNG")
        rows.append({"bytes": buffer.getvalue(), "path": f"{number}.png"})
    info = {"info": {"features": {"label": {"names": list("abcdefghij")}}}}
    table = pa.table({"img": rows, "label": [i % 10 for i in range(count)]})
    out = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({b"huggingface": json.dumps(info).encode()}), out)
    return out.getvalue()


def test_a_damaged_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, outcome = parquet(10), [0, 0]
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "cifar10" / "test.parquet").write_bytes(good)
    monkeypatch.setenv("PETUNE_CACHE", str(tmp_path / "cache"))

    @seed(3)
    @SETTINGS
    @given(harms=DAMAGE, end=st.booleans())
    def each(harms: list[tuple[str, float, bytes]], end: bool) -> None:
        at = max(0, len(good) - 1500) if end else 0  # the footer is where Arrow's own errors come from
        (tmp_path / "cifar10" / "train.parquet").write_bytes(good[:at] + damaged(good[at:], harms))
        outcome[0] += 1
        try:
            outcome[1] += len(load_cifar("cifar10", tmp_path).train) > 0
        except DataError as error:
            outcome[1] += "cifar10" in str(error)

    each()
    tally("Parquet with changed bytes", "a dataset, or one error that names the file", *outcome)


COLUMNS: dict[str, Any] = {
    "labels that are missing": {"label": [None] * 10},
    "labels of another type": {"label": ["one"] * 10},
    "labels with a fraction": {"label": [0.5] * 10},
    "labels out of range": {"label": [99] * 10},
    "images that are missing": {"img": [None] * 10},
    "images of another type": {"img": list(range(10))},
    "images without bytes": {"img": [{"path": "x.png"}] * 10},
    "class names of another type": {"names": [1, 2]},
}


@pytest.mark.parametrize("what", COLUMNS)
def test_parquet_that_says_something_else(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PETUNE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cifar10").mkdir()
    change = dict(COLUMNS[what])
    names = change.pop("names", list("abcdefghij"))
    table = pq.read_table(io.BytesIO(parquet(10)))
    for column, values in change.items():
        table = table.set_column(table.column_names.index(column), column, pa.array(values))
    info = {"info": {"features": {"label": {"names": names}}}}
    table = table.replace_schema_metadata({b"huggingface": json.dumps(info).encode()})
    for part in ("train", "test"):
        pq.write_table(table, tmp_path / "cifar10" / f"{part}.parquet")
    if "names" in what:
        assert load_cifar("cifar10", tmp_path).classes == tuple("0123456789")
    else:
        with pytest.raises(DataError, match="cifar10"):
            load_cifar("cifar10", tmp_path)
