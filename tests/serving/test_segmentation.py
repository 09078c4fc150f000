"""Segmentation after training: masks of whole images, evaluation, export, more epochs, several adapters."""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from digit_canvases import NAMES as ALL_NAMES, write_canvases
from numpy.typing import NDArray
from PIL import Image

import petune
from petune.base.errors import UsageError
from petune.cli.prediction_rows import csv_text, table_of
from petune.data.preprocess import Preprocess
from petune.serving.demo import SideBySide
from petune.serving.demo.page import label_of
from petune.serving.image_transform import ImageTransform
from petune.serving.mask_files import MaskFiles
from petune.serving.predictions import Prediction
from petune.serving.whole_image import WholeImage, classes_of, whole_outputs
from tests.program import call

NAMES = ALL_NAMES[:3]
TRAIN = {"epochs": 1, "batch_size": 8, "augment": "none"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch, with its data."""
    folder = tmp_path_factory.mktemp("segmentation")
    dataset = write_canvases(folder / "data", 24)
    petune.run(method="lora", backbone="vit_nano", dataset=dataset, output=folder / "run", train=TRAIN)
    return folder


@pytest.fixture(scope="module")
def predictor(folder: Path) -> petune.Predictor:
    return petune.Predictor(folder / "run")


@pytest.mark.parametrize("size", [(40, 40), (30, 90), (90, 31), (200, 130), (5, 9)])
def test_squares_cover_images_of_every_shape(size: tuple[int, int]) -> None:
    """A model that says which pixels are light returns the light part of the image, wherever it is."""
    image = np.zeros((*size, 3), np.uint8)
    top, left = size[0] // 5, size[1] // 3
    image[top:, left : left + size[1] // 2] = 255
    transform = ImageTransform(Preprocess(32, (0.5,) * 3, (0.5,) * 3), 37, 0.875)

    def outputs_of(pixels: NDArray[Any]) -> torch.Tensor:
        assert pixels.shape[1:] == (32, 32, 3)
        light_BSS = torch.from_numpy(pixels[..., 0].astype(np.float32)) - 127.5
        return torch.stack([-light_BSS, light_BSS], 1)

    whole = WholeImage.read(image, transform)
    mask = classes_of(whole_outputs(whole, outputs_of, batch_size=3), size)
    assert mask.shape == size
    wrong = mask != (image[..., 0] > 0)
    assert wrong.mean() < (0.03 if min(size) > 5 else 0.15)


def test_masks_of_images_in_their_own_size(
    folder: Path, predictor: petune.Predictor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_canvases(tmp_path / "wide", 2, height=40, width=70)
    images = [tmp_path / "wide/0.png", folder / "data/0.png"]
    with Image.open(images[0]) as image:
        image.getexif()[0x0112] = 6
        image.save(tmp_path / "turned.jpg", exif=image.getexif())
    predictions = predictor([*images, tmp_path / "turned.jpg", tmp_path / "missing.png"])
    assert [p.mask.shape for p in predictions[:3] if p.mask is not None] == [(40, 70), (32, 32), (70, 40)]
    assert predictions[3].error
    first = predictions[0]
    assert first.mask is not None
    assert first.kind == "mask"
    assert first.fractions is not None
    assert first.fractions["background"] == pytest.approx(float((first.mask == 0).mean()))

    done = call("predict", folder / "run", *images, "-o", tmp_path / "masks", "--json", capture=capsys)
    assert done.code == 0
    assert [json.loads(line)["fractions"].keys() for line in done.out.splitlines()] == [first.fractions.keys()] * 2
    with Image.open(tmp_path / "masks/0.png") as mask, Image.open(tmp_path / "masks/0-overlay.png") as overlay:
        assert (mask.mode, mask.size, overlay.size) == ("P", (70, 40), (70, 40))
        assert np.array_equal(np.asarray(mask), first.mask)
    summary = json.loads((tmp_path / "masks/summary.json").read_text())
    assert summary["classes"] == list(NAMES)
    assert [entry["mask"] for entry in summary["images"]] == ["0.png", "0-2.png"]
    columns, (row,), *_ = table_of([first])
    assert columns[1] == "share of the pixels"
    assert "background" in row[1]
    assert csv_text([first]).startswith("image,background,one,zero,error")


def test_masks_are_of_segmentation_only(predictor: petune.Predictor, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="top_k"):
        predictor([folder / "data/0.png"], top_k=2)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        MaskFiles.of(predictor, tmp_path / "file")


def test_evaluation(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = petune.RunResult.read(folder / "run")
    done = call("eval", folder / "run", capture=capsys)
    assert done.code == 0
    assert all(f"| {name}" in done.out for name in ("class", *NAMES))
    evaluation = json.loads((folder / "run/eval-test/eval.json").read_text())
    assert evaluation["metrics"] == pytest.approx(result.metrics, abs=0.05)
    table = (folder / "run/eval-test/predictions.csv").read_text().splitlines()
    assert "iou(zero)" in table[0]
    assert len(table) == 1 + evaluation["num_images"]
    page = (folder / "run/eval-test/mistakes.html").read_text()
    assert page.count("prediction</") + page.count(">prediction") >= len(table) - 1


@pytest.mark.exhaustive
def test_exported_files_compute_the_masks(folder: Path, tmp_path: Path) -> None:
    petune.export(folder / "run", tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    predictor = petune.Predictor(folder / "run")
    x = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(program(x), predictor.outputs(x), atol=1e-4, rtol=1e-4)
    petune.export(folder / "run", tmp_path / "model.safetensors")


@pytest.mark.exhaustive
def test_the_examples_of_its_card_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("adapter").symlink_to(folder / "run/adapter")
    Path("image.png").symlink_to(folder / "data/0.png")
    text = Path("adapter/README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: image-segmentation" in text
    assert "type: mean_iou" in text
    whole, own, by_peft = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(whole, names)
    assert "'background'" in capsys.readouterr().out
    x = torch.randn(2, 3, 32, 32)
    expected = names["predictor"].outputs(x)
    for code, result in ((own, "attachment.model"), (by_peft, "tuned")):
        names = {"model": backbone()}
        exec(code, names)
        torch.testing.assert_close(eval(result, names).eval()(x), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.exhaustive
def test_the_demo_shows_masks(folder: Path) -> None:
    demo = SideBySide([folder / "run"], device="cpu")
    assert demo.has_mask(demo.names[0])
    _, (answer,) = demo(folder / "data/0.png")
    assert answer.overlay is not None
    assert answer.overlay.shape == (320, 320, 3)
    shown = label_of(answer.prediction)
    assert isinstance(shown, dict)
    assert sum(shown.values()) == pytest.approx(1)


@pytest.mark.exhaustive
def test_more_epochs_start_from_the_head(folder: Path, tmp_path: Path) -> None:
    notes: list[str] = []

    def watch(event: object) -> None:
        if isinstance(event, petune.Note):
            notes.append(event.text)

    train = {**TRAIN, "lr": 1e-9}
    again = petune.run(from_run=folder / "run", output=tmp_path / "more", train=train, watch=watch)
    assert any("with its classifier" in note for note in notes)
    before = petune.RunResult.read(folder / "run").metrics["miou"]
    assert again.metrics["miou"] == pytest.approx(before, abs=2)


@pytest.mark.exhaustive
def test_many_adapters_with_heads_of_their_own(folder: Path) -> None:
    predictor = petune.Predictor(folder / "run")
    twin = petune.add_dense_head(backbone(), len(NAMES))
    bank = petune.AdapterBank(twin)
    bank.load("first", folder / "run/adapter")
    x = torch.randn(2, 3, 32, 32)
    first, own = bank(x, ["first", None])
    torch.testing.assert_close(first, predictor.outputs(x)[0], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(own, first, atol=1e-2)


def backbone() -> Any:
    from petune.backbones.create import create_backbone

    return create_backbone("vit_nano", num_classes=len(NAMES)).model


def test_masks_replace_no_other_files(folder: Path, predictor: petune.Predictor, tmp_path: Path) -> None:
    image = next((folder / "data").rglob("*.png"))
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / image.name).write_bytes(image.read_bytes())
    with pytest.raises(UsageError, match="other files"):
        MaskFiles.of(predictor, photos)
    names = []
    for path in (image, photos / image.name, image):
        files = MaskFiles.of(predictor, tmp_path / "masks")
        names.append(files.write(predictor([path])[0])[0].name)
        files.write_summary()
    assert names[0] == names[2] != names[1]
    summary = json.loads((tmp_path / "masks" / "summary.json").read_text())
    assert {entry["image"] for entry in summary["images"]} == {str(image), str(photos / image.name)}


def test_masks_of_other_calls_are_kept(
    folder: Path, predictor: petune.Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks, pixels = tmp_path / "masks", (folder / "data/0.png").read_bytes()
    for name in ("one/cat.png", "two/cat.png", "two/cat-overlay.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(pixels)
    monkeypatch.chdir(tmp_path / "one")
    MaskFiles.of(predictor, masks).write(predictor(["cat.png"])[0])  # and stopped before the summary
    kept = {file.name: file.read_bytes() for file in masks.glob("*.png")}
    assert kept.keys() == {"cat.png", "cat-overlay.png"}
    monkeypatch.chdir(tmp_path / "two")
    for name in ("cat.png", "cat-overlay.png"):
        files = MaskFiles.of(predictor, masks)
        files.write(predictor([name])[0])
        files.write_summary()
    assert {name: (masks / name).read_bytes() for name in kept} == kept
    listed = [entry["mask"] for entry in json.loads((masks / "summary.json").read_text())["images"]]
    assert listed == ["cat-2.png", "cat-overlay-2.png"]


def test_a_stop_leaves_a_summary(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[Any]] = []
    most = 0

    def stream(self: petune.Predictor, images: Any, **_: object) -> Iterator[Prediction]:
        nonlocal most
        for image in images:
            if not image.is_file():
                raise KeyboardInterrupt
            prediction = Prediction(str(image), kind="mask", mask=np.zeros((32, 32), np.uint8), fractions={"one": 1.0})
            alive.append(weakref.ref(prediction.mask))
            most = max(most, sum(mask() is not None for mask in alive))
            yield prediction
            del prediction

    monkeypatch.setattr(petune.Predictor, "stream", stream)
    images = [folder / f"data/{i}.png" for i in range(8)]
    for last in (tmp_path / "stop", images[0]):
        done = call("predict", folder / "run", *images, last, "-o", tmp_path / "masks", capture=capsys)
        assert done.code == (0 if last.is_file() else 130), done.err
        summary = json.loads((tmp_path / "masks" / "summary.json").read_text())
        assert {entry["mask"] for entry in summary["images"]} == {f"{i}.png" for i in range(8)}
    assert most < 5  # not the masks of all images
    refused = call("predict", folder / "run", folder / "data", "-o", folder / "data" / "masks", capture=capsys)
    assert (refused.code, "Name a directory elsewhere" in refused.err) == (2, True)
