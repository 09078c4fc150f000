"""`table:FILE`: columns found and named, targets of every kind, splits and groups, one clear error for each fault."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from petune.base.errors import ConfigError, DataError
from petune.data import load_dataset
from petune.data.lookup import dataset_target, find_dataset, is_training_dataset, manifest_of
from petune.data.manifest import changes, digests
from petune.data.reader import ReadContext
from petune.data.registry import build_reader
from tests.data.tables import digit, load, write_images, write_table

CIFAR = Path("/work/shared/data/cifar10/test.parquet")


@pytest.fixture
def names(tmp_path: Path) -> list[str]:
    """Return the names of 20 images in tmp_path."""
    return write_images(tmp_path, 20)


def rows_of(names: list[str], **columns: Any) -> list[dict[str, Any]]:
    """Return a row for each image; a function gives the value of row i."""
    return [{"file": name, **{key: make(i) for key, make in columns.items()}} for i, name in enumerate(names)]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_labels_stay_text(suffix: str, tmp_path: Path, names: list[str]) -> None:
    path = write_table(tmp_path / f"t{suffix}", rows_of(names, label=lambda i: ["NA", "None", "01", "1"][i % 4]))
    dataset = load_dataset(str(path), image_size=8)
    assert dataset.target.kind == "class"
    assert {*dataset.classes} == {"NA", "None", "01", "1"}
    assert (len(dataset.train), len(dataset.test)) == (16, 4)
    assert dataset.train.names is not None
    assert Path(dataset.train.names[0]).is_file()


def test_classes_are_in_natural_order(tmp_path: Path, names: list[str]) -> None:
    path = write_table(tmp_path / "t.csv", rows_of(names, label=lambda i: ["10", "B2", "2", "a10", "A9"][i % 5]))
    assert dataset_target(f"table:{path}").names == ("2", "10", "A9", "a10", "B2")
    assert dataset_target(f"table:{path},classes=[a10,A9,B2,2,10]").names == ("a10", "A9", "B2", "2", "10")
    with pytest.raises(DataError, match="B2"):
        load(path, "classes=[a10,A9,B3,2,10]")


@pytest.mark.parametrize("value", [1, 1.0, True])
def test_classes_of_json(value: Any, tmp_path: Path, names: list[str]) -> None:
    other = False if value is True else 10
    path = write_table(tmp_path / "t.jsonl", rows_of(names, label=lambda i: value if i % 2 else other))
    assert load(path, "label=label").classes == (("false", "true") if value is True else ("1", "10"))


def test_pixels_equal_those_of_a_folder(tmp_path: Path) -> None:
    for name in "ab":
        write_images(tmp_path / name, 3)
    rows = [{"image": f"{name}/{i}.png", "label": name} for name in "ab" for i in range(3)]
    ours = load(write_table(tmp_path / "t.csv", rows))
    theirs = load_dataset(f"folder:{tmp_path}", image_size=8)
    for part in ("train", "test"):
        mine, folder = getattr(ours, part), getattr(theirs, part)
        assert mine.names.tolist() == folder.names.tolist()
        assert np.array_equal(mine.images[mine.rows], folder.images[folder.rows])
        assert np.array_equal(mine.targets, folder.targets)


def test_images_that_do_not_fit_the_cache_are_decoded_on_request(tmp_path: Path, names: list[str]) -> None:
    path = write_table(tmp_path / "t.csv", rows_of(names, label=lambda i: "ab"[i % 2]))
    reader = build_reader(str(path))
    on_request, cached = (reader.load(ReadContext(8, cache_gb=size)).train for size in (1e-6, 1.0))
    assert type(on_request.images).__name__ == "OnRequest"
    assert np.array_equal(on_request.images[on_request.rows], cached.images[cached.rows])


def test_bytes_paths_and_arrays_give_the_same_pixels(tmp_path: Path, names: list[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    labels = ["ab"[i % 2] for i in range(20)]
    arrays = [digit(i) for i in range(20)]
    encoded = [(tmp_path / name).read_bytes() for name in names]
    tables = {
        "path": pa.table({"image": names, "label": labels}),
        "bytes": pa.table({"image": encoded, "label": labels}),
        "struct": pa.table({"image": [{"bytes": each, "path": None} for each in encoded], "label": labels}),
        "list": pa.table(
            {"image": pa.array([a.tolist() for a in arrays], pa.list_(pa.list_(pa.uint8()))), "label": labels}
        ),
        "tensor": pa.table(
            {"image": pa.FixedShapeTensorArray.from_numpy_ndarray(np.stack(arrays)), "label": pa.array(labels)}
        ),
    }
    datasets = []
    for name, table in tables.items():
        pq.write_table(table, tmp_path / f"{name}.parquet")
        datasets.append(load(tmp_path / f"{name}.parquet"))
    lines = write_table(
        tmp_path / "t.jsonl", [{"image": a.tolist(), "label": b} for a, b in zip(arrays, labels, strict=True)]
    )
    datasets.append(load(lines))
    expected = datasets[0].train
    for dataset in datasets:
        train = dataset.train
        assert np.array_equal(train.images[train.rows], expected.images[expected.rows])


def test_arrays_of_16_bit_and_color(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    gray = np.stack([digit(i).astype(np.uint16) * 257 for i in range(8)])
    color = np.stack([np.stack([digit(i)] * 3) for i in range(8)])  # (N, C, H, W)
    labels = list("aabb" * 2)
    for name, arrays, options in (("gray", gray, ""), ("color", color, "channels_first=true")):
        column = pa.FixedShapeTensorArray.from_numpy_ndarray(arrays)
        pq.write_table(pa.table({"pixels": column, "label": labels}), tmp_path / f"{name}.parquet")
        train = load(tmp_path / f"{name}.parquet", options).train
        assert 150 < train.images[train.rows].max() <= 255
    with pytest.raises(DataError, match="channels_first=true"):
        load(tmp_path / "color.parquet")


def test_several_classes(tmp_path: Path, names: list[str]) -> None:
    labels = [["cat", "dog"], ["cat"], ["dog", "10"], []]
    lists = write_table(tmp_path / "t.jsonl", rows_of(names, tags=lambda i: labels[i % 4]))
    text = write_table(tmp_path / "t.csv", rows_of(names, tags=lambda i: "| ".join(labels[i % 4])))
    flags = write_table(
        tmp_path / "f.csv",
        rows_of(
            names,
            **{
                "10": lambda i: int(i % 4 == 2),
                "cat": lambda i: int(i % 4 < 2),
                "dog": lambda i: ["1.0", "0", "true", "false"][i % 4],
            },
        ),
    )
    datasets = [load(lists, "labels=tags"), load(text, "labels=tags,separator=|"), load(flags, "labels=[10,cat,dog]")]
    for dataset in datasets:
        assert (dataset.target.kind, dataset.classes) == ("multi_hot", ("10", "cat", "dog"))
        assert np.array_equal(dataset.train.targets, datasets[0].train.targets)
        assert len(dataset.test)
    assert "5 images without any label" in datasets[0].source


def test_numbers(tmp_path: Path, names: list[str]) -> None:
    path = write_table(tmp_path / "t.csv", rows_of(names, x=lambda i: i / 4, y=lambda i: f"{i}e3", target=lambda i: -i))
    assert load(path).target.names == ("target",)
    dataset = load(path, "target=[x,y]")
    assert (dataset.target.kind, dataset.target.names) == ("number", ("x", "y"))
    both = np.concatenate([dataset.train.targets, dataset.test.targets])
    assert sorted(both[:, 1]) == [i * 1000.0 for i in range(20)]
    assert np.array_equal(both[:, 0] * 4000, both[:, 1])


def test_splits_weights_and_groups(tmp_path: Path, names: list[str]) -> None:
    parts = ["Training", "train", "validation", "test"]
    rows = rows_of(names, label=lambda i: "ab"[i // 4 % 2], part=lambda i: parts[i % 4], w=lambda i: i / 10)
    path = write_table(tmp_path / "t.csv", rows)
    dataset = load(path, "split=part,weight=w")
    assert [len(dataset.train), len(dataset.val), len(dataset.test)] == [10, 5, 5]
    assert dataset.test.weights is not None
    assert dataset.test.weights.tolist() == [0.3, 0.7, 1.1, 1.5, 1.9]
    grouped = load(
        write_table(tmp_path / "g.csv", rows_of(names, label=lambda i: "ab"[i % 2], patient=lambda i: i // 4)),
        "group=patient",
    )
    with_val = grouped.with_val(0.3, seed=0)
    groups = [{*getattr(with_val, part).groups.tolist()} for part in ("train", "val", "test")]
    assert all(groups)
    assert sum(map(len, groups)) == len(set().union(*groups)) == 5


def test_a_column_called_split_is_used_or_named(tmp_path: Path, names: list[str]) -> None:
    used = write_table(
        tmp_path / "t.csv", rows_of(names, label=lambda i: "ab"[i // 2 % 2], split=lambda i: ["train", "val"][i % 2])
    )
    dataset = load(used)
    assert [len(dataset.train), len(dataset.val), len(dataset.test)] == [10, 0, 10]
    assert "val is used for testing" in dataset.source
    other = write_table(tmp_path / "o.csv", rows_of(names, label=lambda i: "ab"[i % 2], split=lambda i: i % 3))
    assert "column split is not used" in load(other).source


def test_images_of_another_folder_and_those_not_listed(tmp_path: Path) -> None:
    names = write_images(tmp_path / "photos", 10)
    path = write_table(tmp_path / "t.csv", rows_of(names[:8], label=lambda i: "ab"[i % 2]))
    with pytest.raises(DataError, match="8 files of file missing"):
        load(path)
    assert "2 images next to those of the table not listed" in load(path, f"images={tmp_path / 'photos'}").source
    with pytest.raises(DataError, match="no such folder"):
        load(path, "images=nowhere")


def test_copies_stay_together_and_their_labels_are_compared(tmp_path: Path, names: list[str]) -> None:
    for i in range(10):
        (tmp_path / names[10 + i]).write_bytes((tmp_path / names[i]).read_bytes())
    dataset = load(
        write_table(tmp_path / "t.csv", rows_of(names, label=lambda i: "b" if i == 19 or i % 2 == 0 else "a"))
    )
    assert not {*dataset.train.rows.tolist()} & {*dataset.test.rows.tolist()}
    assert "10 copies of other images" in dataset.source
    assert "warning: 1 copy has another target" in dataset.source
    parts = write_table(
        tmp_path / "s.csv", rows_of(names, label=lambda i: "ab"[i % 2], split=lambda i: "train" if i < 10 else "test")
    )
    assert "10 of them in another split" in load(parts).source


def test_a_broken_image(tmp_path: Path) -> None:
    names = write_images(tmp_path, 120)
    (tmp_path / names[5]).write_bytes(b"not an image")
    path = write_table(tmp_path / "t.csv", rows_of(names, label=lambda i: "ab"[i % 2]))
    with pytest.raises(DataError, match=r"5\.png: not a readable image"):
        load(path)
    dataset = load(path, on_broken="skip")
    assert len(dataset.train) + len(dataset.test) == 119
    assert "1 broken image skipped" in dataset.source
    (tmp_path / names[6]).write_bytes(b"")
    with pytest.raises(DataError, match="2 of 120"):
        load(path, on_broken="skip")


def test_exif_palette_cmyk_and_16_bit_follow_one_policy(tmp_path: Path) -> None:
    gray = digit(0, 16)
    turned = Image.fromarray(gray)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(gray).convert("P").save(tmp_path / "palette.png")
    Image.fromarray(gray).convert("CMYK").save(tmp_path / "cmyk.tif")
    Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    kinds = ["turned.png", "palette.png", "cmyk.tif", "deep.png"]
    rows = [
        {"image": name, "label": label, "split": part}
        for name in kinds
        for label, part in (("a", "train"), ("b", "train"), ("a", "test"))
    ]
    train = load(write_table(tmp_path / "t.csv", rows), image_size=14).train
    images = {Path(n).name: train.images[r] for n, r in zip(train.names, train.rows, strict=True)}
    expected = images["palette.png"].astype(int)
    assert np.abs(images["deep.png"].astype(int) - expected).max() <= 1
    assert np.abs(images["cmyk.tif"].astype(int) - expected).max() <= 2
    assert np.abs(np.rot90(expected, -1) - images["turned.png"]).max() <= 1


@pytest.mark.parametrize(
    ("content", "options", "match"),
    [
        ("", "", "empty"),
        ("file,label\n", "", "no rows"),
        ("0.png,a\n1.png,b\n", "", "header"),
        ("file,file\n0.png,a\n", "", "two columns"),
        ("file,label\n0.png,a,b\n", "", "line 2 has 3 cells"),
        ("file,label\n0.png,a\n1.png,\n2.png, \n", "", r"line 3, line 4, 2 rows"),
        ("file,label\n0.png,a\n,b\n", "", "line 3: file is empty"),
        ("file,label\n0.png,a\n1.png,b\nno.png,b\n", "", r"1 file of file missing: .*no\.png \(line 4\)"),
        ("file,label\nhttps://a.b/0.png,a\n", "image=file", "URL"),
        ("file,breed\n0.png,a\n", "", "Columns: file, breed"),
        ("file,breed\n0.png,a\n", "label=bred", "Did you mean breed"),
        ("file,breed\n0.png,a\n", "label=breed,image=fil", "Did you mean file"),
        ("name,breed\nx,a\n", "label=breed", "no column of images"),
        ("a,b,label\n0.png,1.png,x\n", "", "several columns of images: a, b"),
        ("file,label,target\n0.png,a,1\n", "", "several columns of targets"),
        ("file,y\n0.png,1\n1.png,nan\n", "target=y", "line 3"),
        ("file,y\n0.png,1\n1.png,inf\n", "target=y", "line 3"),
        ("file,y\n0.png,1\n1.png,\n", "target=y", "line 3"),
        ("file,y\n0.png,cat\n1.png,cat\n", "target=y", "label=y"),
        ("file,a,b\n0.png,1,0\n1.png,-1,1\n", "labels=[a,b]", "'-1'"),
        ("file,labels\n0.png,a|b\n", "", "separator"),
        ("file,labels\n0.png,a||b\n", "separator=|", "empty"),
        ("file,label,part\n0.png,a,train\n1.png,b,extra\n", "split=part", "extra"),
        ("file,label,part\n0.png,a,test\n1.png,b,test\n", "split=part", "no row has train"),
        ("file,label,split\n0.png,a,train\n1.png,a,train\n2.png,b,test\n", "", "no training images for b"),
        ("file,label,w\n0.png,a,1\n1.png,b,-1\n", "weight=w", "negative"),
        ("file,label,w\n0.png,a,1\n1.png,b,x\n", "weight=w", "not a finite number"),
        ("file,label,w\n0.png,a,0\n1.png,b,0\n", "weight=w", "0 in all rows"),
        ("file,label,g,split\n0.png,a,p 1,train\n1.png,b,p 1,test\n", "group=g", "p 1 is in train and test"),
        ("file,label,g\n0.png,a,1\n1.png,b,\n", "group=g", "g is empty in line 3"),
        ("file,label,g\n0.png,a,1\n1.png,b,1\n", "group=g", "one group only"),
        ("file,label\n0.png,a\n1.png,a\n", "", "At least two"),
    ],
)  # fmt: skip
def test_bad_tables(content: str, options: str, match: str, tmp_path: Path, names: list[str]) -> None:
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(DataError, match=match):
        load(tmp_path / "t.csv", options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ("label=a,mask=b", "label and mask"),
        ("lable=a", "Did you mean label"),
        ("label=a,first_class=1", "only for masks"),
        ("label=a,separator=x", "separator"),
        ("classes=[a,a]", "twice"),
        ("first_class=300", "first_class"),
    ],
)
def test_bad_options(options: str, match: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("file,a,b\n")
    with pytest.raises(ConfigError, match=match):
        load(tmp_path / "t.csv", options)


def test_other_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        load(tmp_path / "none.csv")
    (tmp_path / "t.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match="Parquet"):
        load(tmp_path / "t.parquet")
    (tmp_path / "t.txt").write_text("x")
    with pytest.raises(DataError, match="no table"):
        load(tmp_path / "t.txt")
    (tmp_path / "t.csv").write_bytes("file,label\n0.png,é\n".encode("latin-1"))
    with pytest.raises(DataError, match="UTF-8"):
        load(tmp_path / "t.csv")
    (tmp_path / "t.jsonl").write_text('{"file": "0.png"}\n[1]\n')
    with pytest.raises(DataError, match="line 2"):
        load(tmp_path / "t.jsonl")


def test_arrays_with_mixed_channels(tmp_path: Path) -> None:
    arrays = [digit(i) if i < 9 else np.stack([digit(i)] * 3, -1) for i in range(10)]
    path = tmp_path / "t.jsonl"
    path.write_text(
        "".join(json.dumps({"image": a.tolist(), "label": "ab"[i % 2]}) + "\n" for i, a in enumerate(arrays))
    )
    with pytest.raises(DataError, match=r"1 channel in .*line 1 and 3 channels in .*line 10"):
        load(path)


def test_spreadsheets_that_write_semicolons_and_a_byte_order_mark(tmp_path: Path, names: list[str]) -> None:
    text = "file;label\r\n" + "".join(f'"{name}";"{"ab"[i % 2]}, c"\r\n' for i, name in enumerate(names))
    (tmp_path / "t.csv").write_bytes(text.encode("utf-8-sig"))
    assert load(tmp_path / "t.csv").classes == ("a, c", "b, c")


def test_similar_classes_are_pointed_out(tmp_path: Path, names: list[str]) -> None:
    path = write_table(tmp_path / "t.csv", rows_of(names, label=lambda i: ["cat", "Cat ", "dog"][i % 3]))
    assert (
        "differ only in case or spaces: 'cat' and 'Cat '" in load(path).source
        or "'Cat ' and 'cat'" in load(path).source
    )


def test_the_manifest_changes_with_table_and_images(tmp_path: Path, names: list[str]) -> None:
    rows = rows_of(names, label=lambda i: "ab"[i % 2], split=lambda i: ["train", "train", "test", "test"][i % 4])
    path = write_table(tmp_path / "t.csv", rows)
    before = manifest_of(str(path))
    assert before.keys() == {"train", "test"}
    write_table(path, [*rows[:-1], {**rows[-1], "label": "a"}])
    assert "test/a had 5 images, has 6" in changes(before, manifest_of(str(path)))
    write_table(path, rows)
    assert manifest_of(str(path)) == before
    Image.fromarray(digit(30, 40)).save(tmp_path / names[0])
    assert changes(before, manifest_of(str(path)))
    assert find_dataset(str(path)) == str(path)
    assert manifest_of(f"table:{tmp_path / 'none.csv'}") == {}


def test_the_manifest_of_embedded_images(tmp_path: Path) -> None:
    def write(start: int) -> Path:
        content = []
        for i in range(start, start + 8):
            buffer = io.BytesIO()
            Image.fromarray(digit(i)).save(buffer, "png")
            content.append({"image": buffer.getvalue(), "label": "ab"[i % 2]})
        return write_table(tmp_path / "t.parquet", content)

    before = manifest_of(str(write(0)))
    assert manifest_of(str(write(0))) == before
    assert changes(before, manifest_of(str(write(2))))


def test_a_copy_or_other_options_of_the_training_table_are_recognized(tmp_path: Path, names: list[str]) -> None:
    path = write_table(tmp_path / "t.csv", rows_of(names, label=lambda i: "ab"[i % 2], other=lambda i: "cd"[i // 10]))
    trained = digests(manifest_of(f"table:{path}"))
    assert is_training_dataset(f"table:{path},label=label", f"table:{path}", trained)
    assert not is_training_dataset(f"table:{path},label=other", f"table:{path}", trained)


@pytest.mark.skipif(not CIFAR.exists(), reason="no shared data here")
def test_class_names_of_parquet_metadata() -> None:
    target = dataset_target(f"table:{CIFAR}")
    assert target.names[:3] == ("airplane", "automobile", "bird")
