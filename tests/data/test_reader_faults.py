"""Files that mean something else than they seem to: nothing is read wrongly or left out without a word."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import petune
from petune.base.errors import DataError
from petune.data import load_dataset
from petune.data.band_files import form_of
from petune.data.bands import ImageForm
from tests.data.tables import digit, load, write_images, write_table
from tests.data.test_vtab import write_vtab
from tests.data.test_wds import samples, write_shard
from tests.fake_plugin import Fake

RNG = np.random.default_rng(0)


def refused(dataset: str, *words: str, **options: Any) -> None:
    """Check that loading ends in a DataError that says all `words`."""
    with pytest.raises(DataError) as caught:
        load_dataset(dataset, image_size=8, **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_a_split_column_with_a_typing_error(tmp_path: Path) -> None:
    names = write_images(tmp_path, 20)
    rows = [
        {"file": name, "label": "ab"[i % 2], "split": ["train", "test"][i % 4 // 2]} for i, name in enumerate(names)
    ]
    for wrong in ("trian", ""):
        rows[0]["split"] = wrong
        refused(str(write_table(tmp_path / "t.csv", rows)), "split", wrong or "empty")


def test_lists_of_flags_need_the_names_of_their_classes(tmp_path: Path) -> None:
    names = write_images(tmp_path, 12)
    rows = [{"file": name, "labels": [1, i % 2, 1 - i % 2]} for i, name in enumerate(names)]
    table = write_table(tmp_path / "t.jsonl", rows)
    refused(str(table), "labels", "classes=")
    refused(f"{table},classes=[a,b]", "3 classes", "names 2")
    dataset = load(table, "classes=[cat,dog,emu]")
    assert dataset.target.names == ("cat", "dog", "emu")
    assert {tuple(row) for row in dataset.train.targets.tolist()} == {(1, 0, 1), (1, 1, 0)}
    rows = [{"file": name, "labels": [2, i % 2, i % 2]} for i, name in enumerate(names)]
    refused(str(write_table(tmp_path / "twice.jsonl", rows)), "twice", "line 1")


def test_tables_with_paths_and_images_or_with_equal_columns(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = write_images(tmp_path, 12)
    embedded: list[dict[str, Any]] = [{"bytes": None, "path": str(tmp_path / name)} for name in names]
    embedded[3]["bytes"] = (tmp_path / names[3]).read_bytes()
    mixed = write_table(tmp_path / "m.parquet", [{"image": x, "label": i % 2} for i, x in enumerate(embedded)])
    refused(str(mixed), "path in row 0", "image in row 3")
    columns = [pa.array(names), pa.array([0, 1] * 6), pa.array([1, 0] * 6)]
    pq.write_table(pa.table(columns, names=["file", "label", "label"]), tmp_path / "twice.parquet")
    refused(str(tmp_path / "twice.parquet"), "two columns called label")


def test_fractions_after_whole_numbers_are_not_cut_off(tmp_path: Path) -> None:
    arrays = [np.full((8, 8, 4), i % 2) if i < 3 else RNG.random((8, 8, 4)).round(2) for i in range(12)]
    rows = [{"image": array.tolist(), "label": i % 2} for i, array in enumerate(arrays)]
    refused(str(write_table(tmp_path / "t.jsonl", rows)), "line 4", "fractions")


def test_array_files_of_a_table_are_read_as_those_of_a_folder(tmp_path: Path) -> None:
    rows = []
    for i in range(12):
        pixels = np.repeat(digit(i, 8)[..., None], 3, -1)
        array = pixels.transpose(2, 0, 1) if i % 2 else pixels
        name = f"{i}.npy" if i % 3 else f"{i}.npz"
        np.save(tmp_path / name, array) if i % 3 else np.savez(tmp_path / name, image=array)
        rows.append({"file": name, "label": "ab"[i % 2]})
    dataset = load(write_table(tmp_path / "t.csv", rows))
    for split in (dataset.train, dataset.test):
        for image, name in zip(split.images[split.rows], split.names, strict=True):
            assert np.array_equal(image[..., 0], image[..., 2]), name
            assert image.any(), name


def test_broken_files_of_bands_are_reported_as_broken(tmp_path: Path) -> None:
    for i in range(100):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        np.save(tmp_path / "ab"[i % 2] / f"{i:03}.npy", RNG.integers(0, 255, (8, 8, 4), dtype=np.uint8))
    broken = tmp_path / "a" / "000.npy"
    broken.write_bytes(broken.read_bytes()[:-50])
    refused(f"folder:{tmp_path}", "000.npy", "not a readable image")
    dataset = load_dataset(f"folder:{tmp_path}", image_size=8, on_broken="skip")
    assert len(dataset.train) + len(dataset.test) == 99
    assert "000.npy" in dataset.source


def test_colors_of_16_bit_keep_their_values(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    for channels in (3, 4):
        path = tmp_path / f"{channels}.tif"
        tifffile.imwrite(path, RNG.integers(0, 9999, (8, 8, channels), dtype=np.uint16), photometric="rgb")
        assert form_of(path) == ImageForm(channels, "uint16")


def test_a_shard_damaged_in_the_middle(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    whole = write_shard(tmp_path / "train-0.tar", samples(0, 40)).read_bytes()
    assert len(load_dataset(f"wds:{tmp_path}", image_size=8).train) > 30
    header = whole.index(b"0020.png")
    for damaged in (whole[:header] + b"?" + whole[header + 1 :], whole[:header] + bytes(len(whole) - header)):
        (tmp_path / "train-0.tar").write_bytes(damaged)
        refused(f"wds:{tmp_path}", "train-0.tar", "damaged")


def test_shards_with_images_of_several_formats(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    files = [
        (name.replace(".png", ".jpg") if i % 4 == 0 else name, data) for i, (name, data) in enumerate(samples(0, 12))
    ]
    write_shard(tmp_path / "a" / "train-0.tar", files)
    dataset = load_dataset(f"wds:{tmp_path}/a", image_size=8)
    assert len(dataset.train) + len(dataset.test) == 12
    arrays = [np.savez, lambda buffer, array: np.save(buffer, array)]
    for number, save in enumerate(arrays):
        files = []
        for i in range(12):
            buffer = io.BytesIO()
            save(buffer, RNG.integers(0, 255, (8, 8, 12), dtype=np.uint8))  # type: ignore[operator]
            suffix = ("npz", "npy")[number]
            files += [(f"{i:04}.{suffix}", buffer.getvalue()), (f"{i:04}.cls", str(i % 2).encode())]
        write_shard(tmp_path / suffix / "train-0.tar", files)
        assert load_dataset(f"wds:{tmp_path / suffix}", image_size=8).train.images.shape[-1] == 12
    files[0] = (files[0][0], files[0][1][:99])
    write_shard(tmp_path / "npy" / "train-0.tar", files)
    refused(f"wds:{tmp_path}/npy", "0000", "not a readable image")


def test_parquet_files_with_other_classes(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")

    def write(folder: str, part: str, names: list[str], column: str = "label", count: int = 12) -> None:
        (tmp_path / folder).mkdir(exist_ok=True)
        features = datasets.Features({"image": datasets.Image(), column: datasets.ClassLabel(names=names)})
        data = {"image": [Image.fromarray(digit(i)) for i in range(count)], column: [i % 2 for i in range(count)]}
        datasets.Dataset.from_dict(data, features=features).to_parquet(tmp_path / folder / f"{part}.parquet")

    for folder, names, column in (("order", ["dog", "cat"], "label"), ("column", ["cat", "dog"], "kind")):
        write(folder, "train", ["cat", "dog"])
        write(folder, "test", names, column)
        refused(f"hf:{tmp_path}/{folder}", "train.parquet", "test.parquet", "column label" if folder == "order" else "")


def test_an_empty_split_of_save_to_disk_is_named(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    train = datasets.Dataset.from_dict({"image": [npy(digit(i)) for i in range(4)], "label": [0, 1, 0, 1]})
    datasets.DatasetDict({"train": train, "test": train.select([])}).save_to_disk(str(tmp_path / "d"))
    refused(f"hf:{tmp_path}/d", "split test is empty")


def test_numbers_of_classes_in_vtab(tmp_path: Path) -> None:
    folder = write_vtab(tmp_path / "cifar", (10, 5, 5), classes=2)
    listed = {name: (folder / f"{name}.txt").read_text() for name in ("train800", "val200", "train800val200", "test")}
    for name, text in listed.items():
        (folder / f"{name}.txt").write_text(text.replace("png 1", "png 3"))
    assert "no image of classes 1, 2" in load_dataset(f"vtab:{folder}", image_size=8).source
    for label in ("99999999", "1" + "0" * 20):
        (folder / "test.txt").write_text(listed["test"].replace("png 1", f"png {label}"))
        refused(f"vtab:{folder}", "test.txt", label)


def test_labels_of_medmnist_are_whole_numbers(tmp_path: Path) -> None:
    pytest.importorskip("medmnist")
    parts = {f"{part}_images": np.zeros((4, 28, 28), np.uint8) for part in ("train", "val", "test")}
    labels = {f"{part}_labels": np.full((4, 1), 0.5) for part in ("train", "val", "test")}
    np.savez(tmp_path / "breastmnist.npz", **parts, **labels)  # type: ignore[arg-type]
    refused("medmnist:breastmnist", "float64", data_dir=tmp_path)
    (tmp_path / "breastmnist.npz").write_bytes(npy(np.zeros(3)))
    refused("medmnist:breastmnist", "not a file of MedMNIST", data_dir=tmp_path)


def test_too_few_groups_are_named(tmp_path: Path) -> None:
    names = write_images(tmp_path, 12)
    rows = [{"file": name, "label": "ab"[i % 2], "patient": "xy"[i % 2]} for i, name in enumerate(names)]
    refused(f"{write_table(tmp_path / 't.csv', rows)},group=patient", "groups")


def test_names_of_columns_and_classes_stay_text(tmp_path: Path) -> None:
    names = write_images(tmp_path, 12)
    rows = [{"file": name, "no": ["01", "yes"][i % 2], "007": i} for i, name in enumerate(names)]
    table = write_table(tmp_path / "t.csv", rows)
    assert load(table, "label=no,classes=[yes,01]").classes == ("yes", "01")
    assert load(table, "target=007").target.names == ("007",)


def test_masks_are_decoded_again_when_their_image_changes(tmp_path: Path) -> None:
    names = write_images(tmp_path, 12)
    for name in names:
        Image.fromarray((digit(0) > 99).astype(np.uint8)).save(tmp_path / f"m{name}")
    rows = [{"file": name, "mask": f"m{name}"} for name in names]
    table = write_table(tmp_path / "t.csv", rows)
    load(table, "classes=[back,ink]")
    Image.fromarray(digit(0, 20)).save(tmp_path / names[3])
    refused(f"{table},classes=[back,ink]", names[3])


class Odd(petune.DatasetReader[petune.ReaderConfig]):
    """Images that are none."""

    images: Any = None
    targets: Any = np.arange(12) % 2

    def load(self, context: petune.ReadContext) -> petune.Dataset:
        split = petune.Split.of(self.images, self.targets)
        target = petune.Target("class", ("a", "b"))
        return petune.Dataset("odd", target, "made", "none", split, split.take(np.arange(0)), split)


@pytest.mark.parametrize(
    ("images", "targets"),
    [
        (np.zeros((12, 8, 8, 3)), Odd.targets),
        (np.zeros((12, 8, 8), np.uint8), Odd.targets),
        (np.zeros((12, 3, 8, 8), np.uint8), Odd.targets),
        (np.zeros((4, 8, 8, 3), np.uint8), Odd.targets),
        (np.zeros((12, 8, 8, 3), np.uint8), np.linspace(0, 1, 12)),
    ],
)
def test_what_a_plugin_returns_is_checked(
    images: Any, targets: Any, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake("petune-fake", {"odd": "tests.data.test_reader_faults:Odd"}, group="petune.datasets")
    monkeypatch.setattr(Odd, "images", images)
    monkeypatch.setattr(Odd, "targets", targets)
    refused("odd", "odd/train")


def test_tables_of_one_relative_path_in_two_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, level in (("a", 10), ("b", 200)):
        folder = tmp_path / name
        folder.mkdir()
        rows = [{"image": f"{i}.npy", "label": i % 2} for i in range(8)]
        for i in range(8):
            np.save(folder / f"{i}.npy", np.full((8, 8, 3), level + i, np.uint8))
            os.utime(folder / f"{i}.npy", (1e9, 1e9))
        write_table(folder / "t.csv", rows)
        monkeypatch.chdir(folder)
        assert load(Path("t.csv")).train.images[:].mean() == level + 3.5
