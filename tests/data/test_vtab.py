"""The layout of VTAB-1k, made from real images of CIFAR-100 where they are, and its protocol."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import petune
from petune.base.errors import ConfigError, DataError
from petune.data import load_dataset
from petune.data.lookup import find_dataset, manifest_of
from petune.data.merge import JoinedImages, merge_val
from petune.runner.file_names import FINAL_FIT_DIR
from petune.runner.report.find_runs import find_runs
from petune.training.events import EpochEnded, Note

CIFAR = Path("/work/shared/data/cifar100")
TINY: dict[str, Any] = {
    "method": "adaptformer:bottleneck=4", "backbone": "vit_nano", "weights": "none", "image_size": 8,
    "backbone_options": {"depth": 1, "embed_dim": 24, "num_heads": 2}, "device": "cpu",
    "train": {"epochs": 3, "batch_size": 20, "precision": "fp32", "lr": 0.01},
}  # fmt: skip


def _images(part: str, count: int, classes: int) -> list[tuple[Image.Image, int]]:
    """Return images of CIFAR-100 and their labels, or colored noise where CIFAR-100 is missing."""
    if not CIFAR.is_dir():
        noise = np.random.default_rng(len(part)).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
        return [(Image.fromarray(pixels), i % classes) for i, pixels in enumerate(noise)]
    import pyarrow.parquet as pq

    table = pq.ParquetFile(CIFAR / f"{part}.parquet").read_row_group(0).slice(0, 1000)
    rows = zip(table["img"].to_pylist(), table["fine_label"].to_pylist(), strict=True)
    return [(Image.open(io.BytesIO(image["bytes"])), label % classes) for image, label in rows][:count]


def write_vtab(folder: Path, sizes: tuple[int, int, int] = (80, 20, 30), classes: int = 5) -> Path:
    """Write images and lists as papers share them: here fewer than 800, 200 and all of test."""
    train, val, test = sizes
    lines: dict[str, list[str]] = {"train800": [], "val200": [], "test": []}
    for part, count in (("train", train + val), ("test", test)):
        for number, (image, label) in enumerate(_images(part, count, classes)):
            name = f"images/{part}/{number:06d}.png"
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            image.convert("RGB").save(folder / name)
            listed = "test" if part == "test" else "train800" if number < train else "val200"
            lines[listed].append(f"{name} {label}")
    lines["train800val200"] = lines["train800"] + lines["val200"]
    for listed, content in lines.items():
        (folder / f"{listed}.txt").write_text("\n".join(content) + "\n")
    return folder


def test_the_layout(tmp_path: Path) -> None:
    folder = write_vtab(tmp_path / "data" / "vtab-1k" / "cifar")
    dataset = load_dataset("vtab:cifar", tmp_path / "data", image_size=8)
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (80, 20, 30)
    assert dataset.train.images.shape[1:] == (8, 8, 3)
    assert dataset.train.crop == 1
    assert (dataset.classes, dataset.augment, dataset.refit) == (("0", "1", "2", "3", "4"), "none", True)
    assert find_dataset("vtab:cifar", tmp_path / "data") == str(folder) == find_dataset(f"vtab:{folder}")
    names = (folder / "val200.txt").read_text().split("\n")[0].rpartition(" ")
    assert dataset.val.names is not None
    assert (dataset.val.names[0], dataset.val.targets[0]) == (str(folder / names[0]), int(names[2]))
    before = manifest_of("vtab:cifar", tmp_path / "data")
    Image.new("RGB", (3, 3)).save(folder / "images" / "train" / "000000.png")
    assert manifest_of("vtab:cifar", tmp_path / "data") != before


def test_papers_leave_out_the_folder_of_the_images(tmp_path: Path) -> None:
    folder = write_vtab(tmp_path / "cifar")
    for file in folder.glob("*.txt"):
        file.write_text(file.read_text().replace("images/", ""))
    assert len(load_dataset(f"vtab:{folder}", image_size=8).train) == 80


def test_a_class_without_training_image_is_no_error(tmp_path: Path) -> None:
    folder = write_vtab(tmp_path / "cifar")
    with (folder / "test.txt").open("a") as file:
        (folder / "images" / "test" / "more.png").write_bytes((folder / "images" / "test" / "000000.png").read_bytes())
        file.write("images/test/more.png 7\n")
    assert load_dataset(f"vtab:{folder}", image_size=8).num_classes == 8


def test_val_chooses_then_all_images_train_then_test_once(tmp_path: Path) -> None:
    """The second training equals one on all 1,000 images that ends where val said."""
    folder = write_vtab(tmp_path / "cifar")
    events: list[object] = []
    done = petune.run(dataset=f"vtab:{folder}", output=tmp_path / "run", watch=events.append, **TINY)
    ended = [event for event in events if isinstance(event, EpochEnded)]
    assert [event.epoch for event in ended] == [1, 2, 3, *range(1, done.epoch + 1)]
    assert any("100 images of train and val" in event.text for event in events if isinstance(event, Note))
    assert done.provenance["final_fit"] == "train+val"
    assert "trained again" in dict(done.facts())["top-1 on val"]
    rows = [json.loads(line) for line in (tmp_path / "run" / FINAL_FIT_DIR / "metrics.jsonl").read_text().splitlines()]
    assert len([row for row in rows if "train_loss" in row]) == done.epoch
    assert not any("val_loss" in row for row in rows)
    assert petune.evaluate(tmp_path / "run").top1 == pytest.approx(done.top1)
    assert [run.path for run in find_runs([tmp_path])] == [tmp_path / "run"]
    alone = petune.run(dataset=f"vtab:{folder}", output=tmp_path / "alone", final_fit="none", **TINY)
    assert (alone.epoch, alone.val_metrics) == (done.epoch, done.val_metrics)
    assert "final_fit" not in alone.provenance
    tensors = [(tmp_path / run / "adapter" / "adapter_model.safetensors").read_bytes() for run in ("run", "alone")]
    assert tensors[0] != tensors[1]


@pytest.mark.exhaustive
def test_an_interrupted_second_training_resumes_to_the_same_result(tmp_path: Path) -> None:
    folder = write_vtab(tmp_path / "cifar")

    class Interrupted(Exception):
        pass

    def interrupt(event: object) -> None:
        if isinstance(event, Note) and "train and val" in event.text:
            raise Interrupted

    whole = petune.run(dataset=f"vtab:{folder}", output=tmp_path / "whole", **TINY)
    with pytest.raises(Interrupted):
        petune.run(dataset=f"vtab:{folder}", output=tmp_path / "parts", watch=interrupt, **TINY)
    resumed = petune.run(dataset=f"vtab:{folder}", output=tmp_path / "parts", resume=True, **TINY)
    assert (resumed.metrics, resumed.epoch) == (whole.metrics, whole.epoch)
    tensors = [(tmp_path / run / "adapter" / "adapter_model.safetensors").read_bytes() for run in ("whole", "parts")]
    assert tensors[0] == tensors[1]


def test_any_dataset_may_be_trained_again_on_train_and_val(tmp_path: Path) -> None:
    done = petune.run(dataset="digits", final_fit="train+val", output=tmp_path / "run", **{**TINY, "train": {
        "epochs": 1, "batch_size": 200, "precision": "fp32"}})  # fmt: skip
    assert done.provenance["final_fit"] == "train+val"
    on_val, on_test = (petune.evaluate(tmp_path / "run", split=split, device="cpu") for split in ("val", "test"))
    assert (on_val.trained_on, on_test.trained_on) == (True, False)
    assert "trained on" in dict(on_val.facts())["images"]


def test_all_images_may_train_once_without_a_choice(tmp_path: Path) -> None:
    """The model is that of the second training of a run in which val chose the last epoch."""
    folder = write_vtab(tmp_path / "cifar")
    notes: list[object] = []
    done = petune.run(dataset=f"vtab:{folder}", final_fit="only", output=tmp_path / "only", watch=notes.append, **TINY)
    assert any("100 images of train and val" in event.text for event in notes if isinstance(event, Note))
    assert len([event for event in notes if isinstance(event, EpochEnded)]) == TINY["train"]["epochs"] == done.epoch
    assert (done.val_metrics, done.provenance["final_fit"], done.num_images["train"]) == (None, "only", 100)
    assert "val trained too" in dict(done.facts())["top-1 on val"]
    last = {**TINY, "train": {**TINY["train"], "val_every": TINY["train"]["epochs"]}}
    again = petune.run(dataset=f"vtab:{folder}", output=tmp_path / "again", **last)
    tensors = [(tmp_path / run / "adapter" / "adapter_model.safetensors").read_bytes() for run in ("only", "again")]
    assert tensors[0] == tensors[1]
    assert done.top1 == again.top1
    on_val, on_test = (petune.evaluate(tmp_path / "only", split=split, device="cpu") for split in ("val", "test"))
    assert (on_val.trained_on, on_test.trained_on, on_test.top1) == (True, False, pytest.approx(done.top1))
    table = petune.compare(
        methods=["linear"], seeds=[0], run={**TINY, "dataset": f"vtab:{folder}", "final_fit": "only"},
        output=tmp_path / "compare", watch=lambda event: None,
    )  # fmt: skip
    assert table.rows[0].val_mean == {}
    page = (tmp_path / "compare" / "compare.md").read_text()
    assert "val chooses nothing" in page
    assert "chosen on" not in page


@pytest.mark.parametrize(("final_fit", "options"), [("only", {"patience": 2}), ("only", {}), ("train+val", {})])
def test_a_run_without_val_is_neither_few_shot_nor_stops_early(
    tmp_path: Path, final_fit: Any, options: dict[str, Any]
) -> None:
    train, shots = {**TINY["train"], **options}, None if options else 2
    with pytest.raises(ConfigError, match="patience" if options else "shots"):
        petune.run(
            dataset="digits", final_fit=final_fit, shots=shots, output=tmp_path / "run", **{**TINY, "train": train}
        )


def test_merged_splits_hold_each_image_with_its_target() -> None:
    digits = load_dataset("digits").with_val(0.2, seed=0)
    merged = merge_val(digits)
    assert (len(merged.train), len(merged.val)) == (len(digits.train) + len(digits.val), 0)
    assert merged.train.images is digits.train.images  # both were cut from one array
    other = digits.train.take(np.arange(10))
    apart = petune.Split.of(np.asarray(digits.val.images[digits.val.rows[:4]]), digits.val.targets[:4])
    joined = merge_val(petune.Dataset("two", digits.target, "", "none", other, apart, digits.test)).train
    pixels = joined.images[joined.rows]
    assert np.array_equal(pixels[:10], other.images[other.rows])
    assert np.array_equal(pixels[10:], apart.images)
    assert joined.targets.tolist() == [*other.targets, *apart.targets]
    array = np.arange(5 * 12, dtype=np.uint8).reshape(5, 2, 2, 3)
    both = JoinedImages(array[:2], array[2:])
    assert (both.shape, both.dtype, len(both)) == ((5, 2, 2, 3), np.uint8, 5)
    assert np.array_equal(both[np.array([4, 0, 2])], array[[4, 0, 2]])
    assert np.array_equal(both[1:4], array[1:4])
    assert np.array_equal(both[3], array[3])


def test_merged_masks_and_weights() -> None:
    masks = np.arange(5, dtype=np.uint8)[:, None, None].repeat(2, 1).repeat(2, 2) % 2
    images = np.zeros((5, 2, 2, 3), np.uint8)
    first = petune.Split.of(images[:3], masks[:3])
    second = petune.Split(images[3:], masks[3:], np.arange(2), weights=np.array([2.0, 3.0]))
    target = petune.Target("mask", ("a", "b"))
    train = merge_val(petune.Dataset("m", target, "", "none", first, second, first)).train
    assert train.targets_at(np.arange(5))[:, 0, 0].tolist() == [0, 1, 0, 1, 0]
    assert train.weights is not None
    assert train.weights.tolist() == [1, 1, 1, 2, 3]


def test_what_is_wrong_is_said_before_a_model_is_built(tmp_path: Path) -> None:
    def refused(*words: str) -> None:
        with pytest.raises(DataError) as caught:
            petune.run(dataset="vtab:cifar", data_dir=tmp_path, output=tmp_path / "run", **TINY)
        assert all(word in str(caught.value) for word in words), str(caught.value)

    refused("train800.txt", str(tmp_path))
    folder = write_vtab(tmp_path / "cifar")
    good = (folder / "val200.txt").read_text()
    for text, words in {
        good.replace(" ", "\t"): ("val200.txt", "line 1"),
        good.replace("train/000080", "train/000000"): ("000000.png", "train800.txt"),
        good.replace("train/000080", "train/999999"): ("1 image", "999999.png"),
        "\n".join(good.splitlines()[:-1]): ("train800val200.txt", "000099.png"),
        "": ("val200.txt", "empty"),
    }.items():
        (folder / "val200.txt").write_text(text)
        refused(*words)
    (folder / "val200.txt").unlink()
    refused("no val200.txt")
    (folder / "val200.txt").write_text(good)
    (folder / "images" / "train" / "000003.png").write_bytes(b"cut")
    refused("000003.png", "again")


@pytest.mark.exhaustive
def test_a_thousand_images_of_cifar100(tmp_path: Path) -> None:
    if not CIFAR.is_dir():
        return
    write_vtab(tmp_path / "cifar", (800, 200, 1000), 100)
    done = petune.run(
        method="vpt", backbone="vit_nano", dataset="vtab:cifar", data_dir=tmp_path, output=tmp_path / "run",
        device="cpu", train={"epochs": 2},
    )  # fmt: skip
    assert done.top1 is not None
    assert done.top1 > 10


def test_copies_of_training_files_in_test_are_told(tmp_path: Path) -> None:
    write_vtab(tmp_path / "vtab")
    shutil.copy(tmp_path / "vtab/images/train/000003.png", tmp_path / "vtab/images/test/000005.png")
    for _ in range(2):  # the second time from the cache
        source = load_dataset(f"vtab:{tmp_path / 'vtab'}", image_size=8).source
        assert "warning: 1 image of test is a copy of an image of train, such as images/test/000005.png" in source


def test_lists_may_name_images_by_their_absolute_paths(tmp_path: Path) -> None:
    write_vtab(tmp_path / "images")
    (tmp_path / "lists").mkdir()
    for file in (tmp_path / "images").glob("*.txt"):
        lines = [f"{tmp_path / 'images' / line}\n" for line in file.read_text().splitlines()]
        (tmp_path / "lists" / file.name).write_text("".join(lines))
    name = f"vtab:{tmp_path / 'lists'}"
    dataset, expected = (load_dataset(f"vtab:{tmp_path / folder}", image_size=8) for folder in ("lists", "images"))
    assert np.array_equal(dataset.test.images_at(slice(None)), expected.test.images_at(slice(None)))
    before = manifest_of(name)
    (tmp_path / "images" / "images" / "test" / "000002.png").write_bytes(b"another size")
    assert [part for part, classes in manifest_of(name).items() if classes != before[part]] == ["test"]
