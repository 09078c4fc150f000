"""Predictions of every task: from Python, as a table, JSON and CSV; in the demo; of a plugin's task."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import petune
from petune.base.errors import CheckpointError, PluginError, UsageError
from petune.serving.demo import SideBySide
from petune.serving.demo.page import label_of
from petune.serving.predict import Predictor
from tests.data.tables import digit, write_images
from tests.fake_plugin import fake
from tests.program import call
from tests.sampling import sampled
from tests.serving.conftest import BACKBONE, TRAIN
from tests.trained import changed, saved_run

__all__ = ["fake"]
IMAGES = [digit(i) for i in (7, 8, 9)]
PLUGIN = """
import torch, petune

class Rank(petune.Task[petune.TaskConfig]):
    target_kind = "class"
    metrics = (petune.Metric(name="mae", label="MAE", higher_is_better=False),)

    def num_outputs(self):
        return len(self.target.names) - 1

    def loss(self, outputs, targets, label_smoothing=0.0):
        above = targets[:, None] > torch.arange(outputs.shape[1])
        return torch.nn.functional.binary_cross_entropy_with_logits(outputs, above.float(), reduction="none").sum(1)

    def new_meter(self):
        from torchmetrics import MeanAbsoluteError

        class Meter(petune.TorchMeter):
            def update(self, outputs, targets):
                super().update((outputs > 0).sum(1), targets)
        return Meter({"mae": MeanAbsoluteError()})

    def predict(self, outputs):
        return [self.target.names[int(rank)] for rank in (outputs > 0).sum(1)]
"""


def head_outputs(predictor: Predictor, images: Sequence[Any]) -> torch.Tensor:
    squares, _ = predictor.transform.squares(images)
    return predictor.outputs(predictor.transform.batch(squares, predictor.device))


def test_labels_are_those_at_or_above_the_saved_thresholds(task_runs: dict[str, Path]) -> None:
    predictor = Predictor(task_runs["labels"], device="cpu")
    thresholds = predictor.task.state["thresholds"]
    assert set(predictor.classes) == {"even", "prime", "large"}
    for prediction, outputs_C in zip(predictor(IMAGES), head_outputs(predictor, IMAGES), strict=True):
        probabilities = dict(zip(predictor.classes, outputs_C.double().sigmoid().tolist(), strict=True))
        above = {
            name for name, least in zip(predictor.classes, thresholds, strict=True) if probabilities[name] >= least
        }
        assert prediction.kind == "labels"
        assert {name for name, _ in prediction.top} == above
        assert list(prediction.top) == sorted(prediction.top, key=lambda pair: -pair.probability)
        assert all(probability == pytest.approx(probabilities[name], abs=1e-5) for name, probability in prediction.top)


def test_numbers_are_in_the_units_of_the_targets(task_runs: dict[str, Path]) -> None:
    predictor = Predictor(task_runs["numbers"], device="cpu")
    mean, std = (np.array(predictor.task.state[key]) for key in ("mean", "std"))
    expected = head_outputs(predictor, IMAGES).double().numpy() * std + mean
    for prediction, row in zip(predictor(IMAGES, batch_size=2), expected, strict=True):
        assert (prediction.kind, prediction.top) == ("numbers", ())
        assert prediction.numbers == pytest.approx({"digit": row[0], "rest": row[1]}, rel=1e-5)
        assert 990 < row[1] < 1010
    assert (predictor.classes, predictor.task.name) == ((), "regression")


def test_bytes_are_one_image_and_tensors_none(task_runs: dict[str, Path]) -> None:
    buffer = io.BytesIO()
    Image.fromarray(IMAGES[0]).save(buffer, "PNG")
    predictor = Predictor(task_runs["number"], device="cpu")
    (one,) = petune.predict(task_runs["number"], buffer.getvalue(), device="cpu")
    assert (one.error, one.numbers) == ("", predictor(IMAGES[:1])[0].numbers)
    assert predictor(buffer.getvalue()) == [one]
    assert predictor([IMAGES[0][..., None]])[0].numbers == one.numbers
    for images in (torch.zeros(8, 8, 3, dtype=torch.uint8), [torch.zeros(3, 8, 8)]):
        with pytest.raises(UsageError, match=r"given as a tensor.*Predictor\.outputs"):
            predictor(images)


def test_top_k_is_refused_where_it_does_nothing(task_runs: dict[str, Path]) -> None:
    for name in ("labels", "number"):
        with pytest.raises(UsageError, match=r"top_k .*task (multi_label|regression)"):
            petune.predict(task_runs[name], IMAGES, top_k=2, device="cpu")
    assert len(petune.predict(task_runs["class"], IMAGES, device="cpu")[0].top) == 5


@pytest.mark.parametrize(
    ("name", "columns"),
    sampled(
        [
            ("class", "class probability class_2 probability_2"),
            ("labels", "labels probabilities"),
            ("number", "digit"),
            ("numbers", "digit rest"),
        ],
        lambda row: row[0] in {"labels", "number"},
    ),
)
def test_table_json_and_csv(
    name: str, columns: str, task_runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "images", 3)
    (tmp_path / "images" / "x.png").write_bytes(b"no image")
    words = ["predict", task_runs[name], tmp_path / "images", "--device=cpu", *(["--top-k=2"] * (name == "class"))]
    table = call(*words, capture=capsys)
    assert (table.code, len(table.out.splitlines())) == (4, 5)
    assert ("3 images classified" if name in {"class", "labels"} else "3 images predicted") in table.err
    assert "x.png: not a readable image" in table.err
    lines = [json.loads(line) for line in call(*words, "--json", capture=capsys).out.splitlines()]
    key = {"class": "top", "labels": "labels"}.get(name, "numbers")
    assert [sorted(line) for line in lines] == [sorted([key, "image"])] * 3 + [["error", "image"]]
    rows = list(csv.DictReader(io.StringIO(call(*words, "--csv", capture=capsys).out)))
    assert list(rows[0]) == ["image", *columns.split(), "error"]
    assert [bool(row["error"]) for row in rows] == [False, False, False, True]
    for row, line in zip(rows[:3], lines, strict=False):
        assert row["image"] == line["image"]
        if name == "class":
            assert [row["class"], row["class_2"]] == [guess["class"] for guess in line["top"]]
        elif name == "labels":
            assert [part for part in row["labels"].split(";") if part] == [guess["label"] for guess in line["labels"]]
        else:
            assert {column: float(row[column]) for column in columns.split()} == line["numbers"]
    assert call(*words, "--csv", "--json", capture=capsys).code == 2


@pytest.mark.exhaustive
def test_adapters_of_different_tasks_on_one_backbone(task_runs: dict[str, Path], tmp_path: Path) -> None:
    write_images(tmp_path, 1)
    demo = SideBySide(list(task_runs.values()), device="cpu")
    _, answers = demo(tmp_path / "0.png")
    for answer in answers:
        (alone,) = petune.predict(task_runs[answer.name], [tmp_path / "0.png"], device="cpu")
        assert answer.prediction.kind == alone.kind
        assert [name for name, _ in answer.prediction.top] == [name for name, _ in alone.top]
        assert answer.prediction.numbers == (alone.numbers and pytest.approx(dict(alone.numbers), rel=1e-4))
        assert isinstance(label_of(answer.prediction), dict if alone.top else str)
    assert "MAE on test" in demo.notes["number"]
    assert "mAP on test" in demo.notes["labels"]
    bank = petune.AdapterBank(petune_backbone(task_runs["class"]))
    for name, path in task_runs.items():
        bank.load(name, path / "adapter")
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    rows = bank(x, list(task_runs))
    assert [len(row) for row in rows] == [10, 3, 1, 2]
    for i, (name, path) in enumerate(task_runs.items()):
        torch.testing.assert_close(rows[i], Predictor(path, device="cpu").outputs(x[i : i + 1])[0], msg=name)


def petune_backbone(path: Path) -> torch.nn.Module:
    from petune.runner.run_adapter import read_run_adapter
    from petune.serving.restore import rebuild_backbone

    return rebuild_backbone(read_run_adapter(path)).model


@pytest.mark.exhaustive
def test_what_a_plugin_predicts_is_shown_as_it_is(
    fake: Any,
    task_runs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake("petune-fake-rank", {"rank": "petune_fake_rank:Rank"}, PLUGIN, group="petune.tasks")
    table = task_runs["class"].parent / "digits.jsonl"
    options = {**BACKBONE, "train": {**TRAIN, "epochs": 1}, "dataset": f"table:{table},label=digit"}
    petune.run(**options, method="linear", task="rank", output=tmp_path / "run")
    predictor = Predictor(tmp_path / "run", device="cpu")
    assert head_outputs(predictor, IMAGES).shape == (3, 9)
    write_images(tmp_path, 1)
    words = ("predict", tmp_path / "run", tmp_path / "0.png", "--device=cpu")
    for output in ("7", {"rank": 7, "name": "7"}, {"7": 7.5}, np.array([1, 2])):
        monkeypatch.setattr(type(predictor.task), "predict", lambda self, outputs, value=output: [value] * len(outputs))
        (prediction,) = predictor(IMAGES[:1])
        assert (prediction.kind, prediction.top, len(predictor.classes)) == ("other", (), 10)
        expected = output.tolist() if isinstance(output, np.ndarray) else output
        assert json.loads(call(*words, "--json", capture=capsys).out)["prediction"] == prediction.output == expected
        assert call(*words, capture=capsys).code == call(*words, "--csv", capture=capsys).code == 0
    monkeypatch.setattr(type(predictor.task), "predict", lambda self, outputs: [])
    with pytest.raises(PluginError, match="0 predictions for 1 images"):
        predictor(IMAGES[:1])


def test_a_task_that_is_not_installed_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter, _ = saved_run(tmp_path / "a", "adaptformer")
    target = {"kind": "multi_hot", "names": ["a", "b", "c"]}
    record = {"name": "not-here", "options": {}, "state": {}, "target": target}
    gone = changed(adapter, tmp_path / "gone", task=record)
    for action in (
        lambda: Predictor(gone),
        lambda: SideBySide([gone]),
        lambda: petune.export(gone, tmp_path / "a.pt2"),
    ):
        with pytest.raises(PluginError, match=r"gone was trained for the task 'not-here'.*pip install petune-not-here"):
            action()
    for command in (("predict", gone, "x.png"), ("eval", gone)):
        done = call(*command, capture=capsys)
        assert (done.code != 0, done.err.count("error:"), "not-here" in done.err) == (True, 1, True)
    known = {**record, "name": "multi_label"}
    for number, damage in enumerate(({"name": "multi_label"}, {**known, "target": {"kind": "multi_hot"}})):
        broken = changed(adapter, tmp_path / f"broken{number}", task=damage)
        with pytest.raises(CheckpointError, match="does not record the task"):
            Predictor(broken)


def test_the_demo_takes_other_channels(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 16, 5), dtype=np.uint8)
    for number, image in enumerate(pixels):
        (tmp_path / "data" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / "data" / "ab"[number % 2] / f"{number}.npy", image)
    petune.run(**BACKBONE, dataset=f"folder:{tmp_path / 'data'}", method="linear", train=TRAIN, output=tmp_path / "run")
    file = tmp_path / "data" / "a" / "0.npy"
    shown, (answer,) = SideBySide([tmp_path / "run"], device="cpu")(file)
    assert (shown.shape[2], shown.dtype) == (3, np.uint8)
    assert answer.prediction.top == petune.predict(tmp_path / "run", file, device="cpu")[0].top
