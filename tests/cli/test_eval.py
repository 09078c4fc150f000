"""`petune eval`: reproduces the result of the run; metrics by class, calibration, other images of the same classes."""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pyarrow import csv

import petune as public
from petune.base.errors import ConfigError, DataError, UsageError
from petune.data import load_dataset
from petune.runner.result import RunResult
from petune.serving.evaluation import Evaluation, compute_metrics, confusion_plot
from tests.trained import changed

Run = Callable[..., Any]
ABOUT = {"method": "m", "dataset": "d", "split": "test", "source": "s", "precision": "fp32"}


def test_the_result_of_the_run_is_reproduced(petune: Run, digits: Path, tmp_path: Path) -> None:
    result = RunResult.read(digits)
    done = petune("eval", digits, "--device", "cpu", "--precision", "fp32", "--output", "out", "--json")
    assert done.code == 0, done.err
    evaluation = Evaluation.build(json.loads(done.out))
    assert (evaluation.top1, evaluation.top5) == pytest.approx((result.top1, result.top5))
    assert (
        evaluation.num_images == sum(one.num_images for one in evaluation.classes) == len(load_dataset("digits").test)
    )
    right = sum(evaluation.confusion[c][c] for c in range(10))
    assert 100 * right / evaluation.num_images == pytest.approx(evaluation.top1)
    assert json.loads((tmp_path / "out" / "eval.json").read_text()) == json.loads(done.out)
    for name in ("confusion.svg", "reliability.svg"):
        assert ET.parse(tmp_path / "out" / name).getroot().tag.endswith("svg")
    val = public.evaluate(digits, split="val", device="cpu", precision="fp32")
    assert val.top1 == pytest.approx(result.val_top1)
    named = public.evaluate(digits, split="val", dataset="digits", device="cpu", precision="fp32")
    assert (named.top1, named.num_images) == (val.top1, val.num_images)


def test_the_number_format_is_that_of_the_run(
    petune: Run, tiny: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("petune.training.precision.has_fast_bf16", lambda: True)
    assert petune("run", "--method=linear", *tiny, "--precision=bf16", "--output=half").code == 0
    own = public.evaluate("half", device="cpu")
    assert (own.precision, own.metrics) == ("bf16", RunResult.read(Path("half")).metrics)
    monkeypatch.setattr("petune.training.precision.has_fast_bf16", lambda: False)
    shown = petune("eval", "half", "--device=cpu", "--output=out")
    assert "fp32; the run was tested in bf16" in shown.out + shown.err
    monkeypatch.setattr("petune.training.precision.has_fast_bf16", lambda: True)
    assert petune("run", "--method=linear", *tiny, "--output=full").code == 0  # fp32, here not what auto takes
    assert public.evaluate("full", device="cpu").precision == "fp32"


def test_whether_images_were_trained_on_is_known_by_their_contents(
    petune: Run, tiny: tuple[str, ...], folder: Path, tmp_path: Path
) -> None:
    folder.rename(tmp_path / "own")
    few = [flag for flag in tiny if not flag.startswith(("--shots", "--dataset"))]
    assert petune("run", "--method=linear", *few, "--dataset=folder:own", "--output=first").code == 0
    own = public.evaluate("first", device="cpu")
    assert (own.trained_on, own.num_trained_on) == (False, 0)
    for number, file in enumerate((tmp_path / "own").rglob("*.png")):
        copy = tmp_path / "copies" / file.parent.name / f"{number}-copy.png"
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    copies = public.evaluate("first", dataset="folder:copies", device="cpu")
    assert copies.trained_on
    assert own.num_images < copies.num_images - (copies.num_trained_on or 0) < copies.num_images / 2  # and val
    for file in (tmp_path / "copies").rglob("*.png"):
        Image.open(file).rotate(90).save(file)
    assert public.evaluate("first", dataset="folder:copies", device="cpu").trained_on is False
    alone = public.evaluate(tmp_path / "first" / "adapter", dataset="folder:copies", device="cpu")
    assert alone.trained_on is False  # the run directory is around it
    shutil.copytree(tmp_path / "first" / "adapter", tmp_path / "alone")
    alone = public.evaluate(tmp_path / "alone", dataset="folder:copies", device="cpu")
    assert alone.trained_on is None
    assert "not known" in dict(alone.facts())["images"]


@pytest.mark.exhaustive
def test_top_5_is_not_shown_for_two_classes(petune: Run, tiny: tuple[str, ...], tmp_path: Path) -> None:
    for name, value in (("cat", 10), ("dog", 150)):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(8):
            Image.new("L", (9, 9), value + 5 * i).save(tmp_path / "pets" / name / f"{i}.png")
    few = [flag for flag in tiny if not flag.startswith(("--shots", "--dataset"))]
    pets = [*few, "--dataset=folder:pets"]
    texts = []
    for words in (
        ("run", "--method=linear", *pets, "--output=runs/one"),
        ("eval", "runs/one"),
        ("compare", "linear", *pets, "--output=runs/all"),
        ("report", "runs/one", "runs/all"),
        ("predict", "runs/one", "pets/cat/0.png"),
    ):
        done = petune(*words)
        assert done.code == 0, done.err
        texts.append(done.out + done.err)
    texts += [file.read_text() for end in ("md", "html") for file in tmp_path.rglob(f"*.{end}")]
    assert len(texts) > 6
    assert not [text for text in texts if "top-5" in text.lower()]


def test_every_image_has_a_row(petune: Run, digits: Path, tmp_path: Path) -> None:
    done = petune("eval", digits, "--device", "cpu", "--precision", "fp32", "--output", "out", "--json")
    assert done.code == 0, done.err
    evaluation = Evaluation.build(json.loads(done.out))
    table = pq.read_table(tmp_path / "out" / "predictions.parquet")
    test = load_dataset("digits").test
    assert table.column_names == ["image", "label", "prediction", "correct", "loss", *(f"p({n})" for n in range(10))]
    assert table["label"].to_pylist() == [str(label) for label in test.targets]
    assert table["image"].to_pylist() == [f"test {i}" for i in range(len(test))]
    assert 100 * np.mean(table["correct"]) == pytest.approx(evaluation.top1)
    assert np.mean(table["loss"]) == pytest.approx(evaluation.loss)
    probabilities = np.stack([table[f"p({n})"] for n in range(10)], 1)
    assert probabilities.sum(1) == pytest.approx(1)
    assert [str(best) for best in probabilities.argmax(1)] == table["prediction"].to_pylist()
    assert csv.read_csv(tmp_path / "out" / "predictions.csv").num_rows == len(test)


def test_the_worst_mistakes_are_shown_first(petune: Run, digits: Path, tmp_path: Path) -> None:
    done = petune("eval", digits, "--device", "cpu", "--precision", "fp32", "--output", "out")
    assert done.code == 0, done.err
    rows = pq.read_table(tmp_path / "out" / "predictions.parquet").to_pylist()
    wrong = [row for row in rows if not row["correct"]]
    worst = sorted(wrong, key=lambda row: -row["loss"])[:24]
    confident = sorted(wrong, key=lambda row: -row[f"p({row['prediction']})"])[:24]
    galleries = json.loads((tmp_path / "out" / "mistakes.json").read_text())["galleries"]
    assert [gallery["title"] for gallery in galleries] == ["Worst mistakes", "Confident mistakes"]
    for gallery, expected in zip(galleries, (worst, confident), strict=True):
        assert [tile["lines"][-1] for tile in gallery["tiles"]] == [row["image"] for row in expected]
        assert gallery["tiles"][0]["title"] == f"{expected[0]['label']} → {expected[0]['prediction']}"
        assert [image["caption"] for image in gallery["tiles"][0]["images"]] == ["", "attention"]
    page = (tmp_path / "out" / "mistakes.html").read_text()
    assert page.count("<img ") == 2 * 48
    assert "<script" not in page


def test_the_table(petune: Run, digits: Path, tmp_path: Path) -> None:
    shutil.copytree(digits, tmp_path / "run")
    done = petune("eval", "run", "--device", "cpu", "--format", "png")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[0].replace(" ", "") == "|class|images|recall|precision|mostoftenpredictedas|"
    assert [line.split("|")[1].strip() for line in lines[2:12]] == [str(digit) for digit in range(10)]
    assert "calibration error" in done.out
    assert (tmp_path / "run" / "eval-test" / "confusion.png").read_bytes().startswith(b"\x89PNG")
    alone = petune("eval", "run/adapter", "--device", "cpu", "--split", "val")
    assert alone.code == 0, alone.err  # the run's configuration lies beside it
    assert "--output DIR" in alone.err
    shutil.copytree(digits / "adapter", tmp_path / "alone")
    assert petune("eval", "alone", "--device", "cpu", "--split", "val").code == 0  # the adapter records its splits
    shutil.rmtree(tmp_path / "alone")
    changed(digits / "adapter", tmp_path / "alone", split_options=None)
    lost = petune("eval", "alone", "--split", "val")
    assert (lost.code, "config.yaml" in lost.err) == (2, True)
    assert not list((tmp_path / "alone").glob("eval*"))


def test_metrics_are_printed_if_they_cannot_be_written(petune: Run, digits: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    done = petune("eval", digits, "--device", "cpu", "--precision", "fp32", "--output", "out", "--json")
    assert (done.code, "cannot write" in done.err) == (4, True)
    assert json.loads(done.out)["top1"] == pytest.approx(RunResult.read(digits).top1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of three of the ten classes, in no order of the model's."""
    test = load_dataset("digits").test
    for i in range(60):
        if (label := int(test.targets[i])) in {7, 2, 5}:
            file = tmp_path / "more" / str(label) / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(test.images[test.rows[i]]).save(file)
    return tmp_path / "more"


def test_other_images_of_the_same_classes(petune: Run, digits: Path, folder: Path, tmp_path: Path) -> None:
    done = petune("eval", digits, "--dataset", "folder:more", "--device", "cpu", "--output", "out", "--json")
    assert done.code == 0, done.err
    evaluation = Evaluation.build(json.loads(done.out))
    files = sorted(folder.rglob("*.png"))
    named = public.predict(digits, files, top_k=1, device="cpu")
    right = [one.top[0].name == Path(one.image).parent.name for one in named]
    assert evaluation.num_images == len(files)
    assert evaluation.top1 == pytest.approx(100 * sum(right) / len(right))
    assert [row.name for row in evaluation.classes if row.num_images] == ["2", "5", "7"]
    assert next(row for row in evaluation.classes if row.name == "0").accuracy is None

    (folder / "7" / "x.png").write_bytes(b"no image")
    broken = petune("eval", digits, "--dataset", "folder:more", "--output", "none")
    assert (broken.code, "x.png: not a readable image" in broken.err) == (4, True)
    (folder / "7").rename(folder / "seven")
    strange = petune("eval", digits, "--dataset", "folder:more", "--output", "none")
    assert (strange.code, "no class 'seven'" in strange.err) == (4, True)
    assert not (tmp_path / "none").exists()
    other = petune("eval", digits, "--dataset", "folder:nowhere")
    assert (other.code, "nowhere" in other.err) == (4, True)
    assert petune("eval", "nowhere").code == 4


def test_which_images_of_a_folder_are_read(digits: Path, folder: Path, tmp_path: Path) -> None:
    def evaluated(folder_name: str, split: str = "test") -> Evaluation:
        return public.evaluate(
            digits, dataset=f"folder:{tmp_path / folder_name}", split=split, device="cpu", precision="fp32"
        )

    whole = evaluated("more")
    assert (whole.split, whole.num_images) == ("all", len(list(folder.rglob("*.png"))))
    (tmp_path / "parted").mkdir()
    shutil.copytree(folder, tmp_path / "parted" / "test")
    assert (evaluated("parted").split, evaluated("parted").top1) == ("test", whole.top1)
    with pytest.raises(UsageError, match=r"parted has no val split; it has test"):
        evaluated("parted", "val")
    (tmp_path / "parted" / "test").rename(tmp_path / "parted" / "valid")
    assert [evaluated("parted", split).top1 for split in ("test", "val")] == [whole.top1] * 2  # as a run would
    shutil.copytree(folder / "7", tmp_path / "one" / "7")
    (tmp_path / "one" / "7" / "IMG_1.HEIC").write_bytes(b"ftypheic")
    assert "; 1 .heic skipped" in evaluated("one").source
    (tmp_path / "one" / "7" / "IMG_1.HEIC").unlink()
    assert evaluated("one").num_images == len(list((folder / "7").iterdir()))
    shutil.rmtree(tmp_path / "one" / "7")
    with pytest.raises(DataError, match=r"no images in .*one"):
        evaluated("one")


def test_calibration_computed_by_hand() -> None:
    sure = torch.tensor([0.9, 0.9, 0.9, 0.9, 0.6, 0.6])
    logits = torch.stack([sure, 1 - sure], 1).log()
    evaluation = compute_metrics(logits, torch.tensor([0, 0, 0, 1, 0, 1]), ("a", "b"), **ABOUT)
    assert evaluation.calibration_error == pytest.approx(
        100 * (4 / 6 * abs(0.9 - 0.75) + 2 / 6 * abs(0.6 - 0.5)), abs=1e-4
    )
    filled = [bin for bin in evaluation.bins if bin.num_images]
    assert [(bin.num_images, bin.accuracy) for bin in filled] == [(2, 0.5), (4, 0.75)]
    weights = [bin.num_images / 6 * abs((bin.confidence or 0) - (bin.accuracy or 0)) for bin in filled]
    assert 100 * sum(weights) == pytest.approx(evaluation.calibration_error, abs=1e-4)
    assert (evaluation.top1, evaluation.top5, evaluation.balanced_accuracy) == pytest.approx((400 / 6, 100.0, 50.0))
    assert evaluation.confusion == ((4, 0), (2, 0))
    assert [row.precision for row in evaluation.classes] == [pytest.approx(400 / 6), None]
    assert [row.f1 for row in evaluation.classes] == [pytest.approx(80), 0]
    assert evaluation.macro_f1 == pytest.approx(40)
    assert (evaluation.classes[1].mistaken_for, evaluation.classes[1].mistakes, evaluation.classes[1].accuracy) == (
        "a",
        2,
        0.0,
    )


def test_the_calibration_error_includes_probabilities_of_exactly_one() -> None:
    logits = torch.tensor([[99.0, -99.0], [99.0, -99.0], [3.5, 0.0]])
    assert logits.softmax(-1)[0, 0] == 1
    evaluation = compute_metrics(logits, torch.tensor([0, 1, 0]), ("a", "b"), **ABOUT)
    last = evaluation.bins[-1]
    assert (last.num_images, last.accuracy) == (3, pytest.approx(2 / 3))
    assert evaluation.calibration_error == pytest.approx(100 * abs((last.confidence or 0) - 2 / 3))


def test_class_names_in_plots_are_escaped() -> None:
    names = ("<script>", "$x^2$\x1b" + 40 * "y")
    evaluation = compute_metrics(torch.eye(2), torch.tensor([0, 1]), names, **ABOUT)
    image = confusion_plot(evaluation)
    assert ET.fromstring(image) is not None
    assert b"<script>" not in image
    assert b"$x^2$?" in image
    many = tuple(map(str, range(60)))
    assert confusion_plot(compute_metrics(torch.eye(60), torch.arange(60), many, **ABOUT), "png").startswith(b"\x89PNG")


def test_invalid_arguments(digits: Path) -> None:
    with pytest.raises(public.PetuneError, match="batch_size is 0"):
        public.evaluate(digits, batch_size=0)
    with pytest.raises(ConfigError):
        public.evaluate(digits, device="abacus")
    with pytest.raises(UsageError, match="bogus"):
        public.evaluate(digits, split="bogus")  # type: ignore[arg-type]
    for call in (public.evaluate, public.Predictor):
        with pytest.raises(ConfigError, match="no such precision: 'fp16'"):
            call(digits, precision="fp16")
