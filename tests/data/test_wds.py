"""`wds:SHARDS`: every sample once, keys with dots, labels from files and JSON, shards that are cut short."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from petune.base.errors import DataError, MissingExtra
from petune.data import Dataset, load_dataset
from petune.data.lookup import find_dataset, manifest_of
from petune.data.manifest import changes
from tests.data.tables import digit, digit_class

pytest.importorskip("webdataset")


def png(i: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(digit(i)).save(buffer, "png")
    return buffer.getvalue()


def write_shard(path: Path, files: Sequence[tuple[str, bytes]]) -> Path:
    """Write a tar file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def samples(start: int, end: int) -> list[tuple[str, bytes]]:
    return [
        file
        for i in range(start, end)
        for file in ((f"{i:04}.png", png(i)), (f"{i:04}.cls", str(digit_class(i) % 3).encode()))
    ]


def load(path: Path | str, options: str = "") -> Dataset:
    return load_dataset(f"wds:{path}{options}", image_size=8)


def test_every_sample_of_unequal_shards_is_read_once(tmp_path: Path) -> None:
    write_shard(tmp_path / "a-000.tar", samples(0, 27))
    write_shard(tmp_path / "a-001.tar", samples(27, 30))
    for name in (tmp_path, tmp_path / "a-{000..001}.tar"):
        dataset = load(name)
        images = np.concatenate([split.images[split.rows] for split in (dataset.train, dataset.test)])
        assert len(images) == len({image.tobytes() for image in images}) == 30
        assert dataset.classes == ("0", "1", "2")
    assert dataset.train.names is not None
    assert dataset.train.names[0] == f"{tmp_path}/a-000.tar/0000"


def test_labels_belong_to_their_images(tmp_path: Path) -> None:
    files = samples(0, 20)
    write_shard(tmp_path / "train.tar.gz", [*files[::2], *files[1::2]])  # all images first, then all labels
    dataset = load(tmp_path)
    for split in (dataset.train, dataset.test):
        for name, label in zip(split.names, split.targets, strict=True):
            assert label == digit_class(int(name[-4:])) % 3


def test_splits_by_the_names_of_shards(tmp_path: Path) -> None:
    for name, start in (("pets-train-0", 0), ("pets-train-1", 10), ("pets-val-0", 20), ("pets-test-0", 30)):
        write_shard(tmp_path / f"{name}.tar", samples(start, start + 10))
    dataset = load(tmp_path)
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (20, 10, 10)


def test_values_of_json_files(tmp_path: Path) -> None:
    files = []
    for i in range(20):
        row = {"tags": [["cat"], ["dog", "cat"]][i % 2], "age": i / 2, "caption": "x"}
        files += [(f"d/{i}.png", png(i)), (f"d/{i}.json", json.dumps(row).encode())]
    write_shard(tmp_path / "a.tar", files)
    assert load(tmp_path / "a.tar", ",labels=tags").classes == ("cat", "dog")
    assert load(tmp_path / "a.tar", ",target=age").target.kind == "number"
    with pytest.raises(DataError, match="Columns: png, tags, age, caption"):
        load(tmp_path / "a.tar")


def test_masks(tmp_path: Path) -> None:
    files = []
    for i in range(10):
        buffer = io.BytesIO()
        Image.fromarray((digit(i) // 86).astype(np.uint8)).save(buffer, "png")
        files += [(f"{i}.jpg", png(i)), (f"{i}.seg.png", buffer.getvalue())]
    write_shard(tmp_path / "a.tar", files)
    assert load(tmp_path / "a.tar").target.kind == "mask"


def test_keys_with_two_dots_are_not_merged_silently(tmp_path: Path) -> None:
    files = [f for i in range(9) for v in (1, 2) for f in ((f"{i}.v{v}.png", png(2 * i + v)), (f"{i}.v{v}.cls", b"1"))]
    write_shard(tmp_path / "a.tar", files)
    with pytest.raises(DataError, match=r"0\.v1\.png and 0\.v2\.png are one sample"):
        load(tmp_path / "a.tar")
    views = [
        f for i in range(9) for f in ((f"{i}.l.png", png(i)), (f"{i}.r.png", png(i)), (f"{i}.cls", b"%d" % (i % 2)))
    ]
    write_shard(tmp_path / "b.tar", views)
    assert len(load(tmp_path / "b.tar", ",image=l.png").train)


@pytest.mark.parametrize("size", [700, -10240, -11000])
def test_a_shard_that_is_cut_short_is_named(size: int, tmp_path: Path) -> None:
    write_shard(tmp_path / "a-0.tar", samples(0, 10))
    shard = write_shard(tmp_path / "a-1.tar", samples(10, 20))
    content = shard.read_bytes()
    end = len(content.rstrip(b"\0")) // 512 * 512 + 512 if size == -10240 else size
    shard.write_bytes(content[:end])
    with pytest.raises(DataError, match=r"a-1\.tar is cut short"):
        load(tmp_path)


def test_other_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"no \.tar files"):
        load(tmp_path)
    write_shard(tmp_path / "a-0.tar", samples(0, 10)[:-1])
    with pytest.raises(DataError, match=r"a-1\.tar"):
        load(tmp_path / "a-{0..1}.tar")
    with pytest.raises(DataError, match=r"a-0\.tar/0009"):
        load(tmp_path)
    write_shard(tmp_path / "a-0.tar", [*samples(0, 10), samples(0, 1)[0]])
    with pytest.raises(DataError, match=r"0000\.png twice"):
        load(tmp_path)
    write_shard(tmp_path / "a-0.tar", [*samples(0, 10), ("0011.cls", b"1")])
    with pytest.raises(DataError, match=r"a-0\.tar/0011: png is empty"):
        load(tmp_path)
    for url in ("pipe:cat a.tar", "https://a.b/c.tar"):
        with pytest.raises(DataError, match="Download"):
            load(url)
    monkeypatch.setitem(sys.modules, "webdataset.shardlists", None)
    with pytest.raises(MissingExtra, match=r"petune\[data\]"):
        load(tmp_path)


def test_the_manifest_changes_with_the_shards(tmp_path: Path) -> None:
    write_shard(tmp_path / "a-0.tar", samples(0, 10))
    before = manifest_of(f"wds:{tmp_path}")
    assert find_dataset(f"wds:{tmp_path}") == str(tmp_path)
    write_shard(tmp_path / "a-0.tar", samples(1, 11))
    assert changes(before, manifest_of(f"wds:{tmp_path}"))
    assert manifest_of(f"wds:{tmp_path / 'none'}") == {}


def test_a_key_of_a_json_file_may_be_called_as_another_file(tmp_path: Path) -> None:
    files = []
    for i in range(20):
        row = json.dumps({"cls": 7, "label": "ab"[i % 2]}).encode()
        texts = [(f"{i:02}.json", row), (f"{i:02}.cls", b"%d" % (i % 2))]
        files += [(f"{i:02}.png", png(i)), *(texts if i % 3 else texts[::-1])]
    write_shard(tmp_path / "a.tar", files)
    assert load(tmp_path, ",label=label").classes == ("a", "b")
    assert load(tmp_path, ",label=cls").classes == ("0", "1")  # of the files, in any order
    write_shard(tmp_path / "a.tar", [*files, ("00.json", b"{}")])
    with pytest.raises(DataError, match=r"00\.json twice"):
        load(tmp_path)
