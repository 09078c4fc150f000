"""Evaluations of every task: its metrics, a row for each image, the largest errors, attention over the images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import petune
from petune.cli.prediction_rows import csv_text
from petune.data.target import Target
from petune.serving.evaluation import EvalRequest, evaluate_images, select_images, write_evaluation
from petune.serving.evaluation.attention_maps import attention_maps, over_image
from petune.serving.evaluation.rows import image_rows, table_of, to_csv
from petune.serving.predict import Predictor
from petune.training.task_registry import task_for
from tests.trained import changed, saved_run


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of gray values, with a table of numbers and one of labels."""
    folder = tmp_path_factory.mktemp("tables")
    numbers, labels = ["image,gray"], ["image,bright,dark"]
    for i in range(60):
        value = (37 * i) % 256
        Image.fromarray(np.full((16, 16, 3), value, np.uint8)).save(folder / f"{i}.png")
        numbers.append(f"{i}.png,{value}")
        labels.append(f"{i}.png,{int(value > 100)},{int(value < 150)}")
    (folder / "numbers.csv").write_text("\n".join(numbers))
    (folder / "labels.csv").write_text("\n".join(labels))
    return folder


def _run(dataset: str, output: Path, task: str = "auto") -> petune.RunResult:
    return petune.run(
        method="linear", task=task, backbone="vit_nano", weights="none", backbone_options={"depth": 2, "embed_dim": 48},
        dataset=dataset, device="cpu", train={"epochs": 1, "precision": "fp32"}, output=output,
    )  # fmt: skip


def _evaluated(run: Path, output: Path) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    predictor = Predictor(run, device="cpu")
    evaluated = evaluate_images(predictor, select_images(predictor, EvalRequest(run, "test", None, None, 16)), 16)
    write_evaluation(evaluated, output)
    evaluation = json.loads((output / "eval.json").read_text())
    rows = pq.read_table(output / "predictions.parquet").to_pylist()
    return evaluation, rows, json.loads((output / "mistakes.json").read_text())["galleries"]


def test_a_regression(tables: Path, tmp_path: Path) -> None:
    result = _run(f"table:{tables / 'numbers.csv'},target=gray", tmp_path / "run")
    evaluation, rows, galleries = _evaluated(tmp_path / "run", tmp_path / "out")
    assert evaluation["metrics"] == pytest.approx(result.metrics, rel=1e-4)
    assert list(rows[0]) == ["image", "gray", "predicted gray", "error of gray", "loss"]
    for row in rows:
        assert row["gray"] == (37 * int(Path(row["image"]).stem)) % 256
        assert row["error of gray"] == pytest.approx(row["predicted gray"] - row["gray"])
    assert np.mean([abs(row["error of gray"]) for row in rows]) == pytest.approx(evaluation["metrics"]["mae"], rel=1e-4)
    assert [gallery["title"] for gallery in galleries] == ["Largest errors"]
    largest = max(rows, key=lambda row: row["loss"])
    assert galleries[0]["tiles"][0]["lines"][-1] == largest["image"]
    assert not (tmp_path / "out" / "confusion.svg").exists()


def test_several_labels(tables: Path, tmp_path: Path) -> None:
    result = _run(f"table:{tables / 'labels.csv'},labels=[bright,dark]", tmp_path / "run")
    evaluation, rows, _ = _evaluated(tmp_path / "run", tmp_path / "out")
    assert evaluation["metrics"]["map"] == pytest.approx(result.metrics["map"], rel=1e-4)
    assert list(rows[0]) == ["image", "labels", "predictions", "correct", "loss", "p(bright)", "p(dark)"]
    for row in rows:
        value = (37 * int(Path(row["image"]).stem)) % 256
        assert row["labels"] == ["bright"] * (value > 100) + ["dark"] * (value < 150)
        assert row["correct"] == (row["labels"] == row["predictions"])
    table = pyarrow.csv.read_csv(tmp_path / "out" / "predictions.csv").to_pylist()
    assert {row["labels"] for row in table} <= {"bright", "dark", "bright;dark", ""}


def test_rows_of_several_labels_computed_by_hand() -> None:
    task = task_for("auto", Target("multi_hot", ("a", "b", "c")), "made")
    outputs, targets = torch.tensor([[2.0, -1, -3], [2.0, -1, 3]]), torch.tensor([[1, 0, 0], [0, 1, 1]])
    right, wrong = image_rows(task, ["x", "y"], outputs, targets, torch.tensor([0.1, 0.2]))
    assert (right.is_wrong, right.confidence) == (False, None)
    assert (wrong.target, wrong.prediction) == ("b, c", "a, c")
    assert wrong.confidence == pytest.approx(torch.sigmoid(torch.tensor(2.0)).item())
    assert to_csv(table_of([right, wrong])).decode().splitlines()[2].startswith('"y","b;c","a;c",false,')


def test_attention_is_over_the_patches(digits: Path) -> None:
    predictor = Predictor(digits, device="cpu")
    x = torch.randn(3, *predictor.sites.input_size)
    maps = attention_maps(predictor, x)
    assert maps is not None
    assert maps.shape == (3, *(predictor.sites.grid_size or ()))
    assert (maps.amin((1, 2)).abs().max(), maps.amax((1, 2)).min()) == (0, 1)
    heat = torch.zeros(4, 4)
    heat[3, 0] = 1
    colored = over_image(np.full((32, 32, 3), 90, np.uint8), heat)
    assert np.unravel_index(colored.sum(2).argmax(), (32, 32))[0] > 24
    assert np.unravel_index(colored.sum(2).argmax(), (32, 32))[1] < 8


def test_a_model_with_windows_has_no_attention_over_the_image(tmp_path: Path) -> None:
    petune.run(
        method="linear", backbone="swin_tiny_patch4_window7_224", weights="none", dataset="digits", shots=5,
        backbone_options={"img_size": 32, "window_size": 4, "embed_dim": 24, "depths": [2], "num_heads": [2]},
        device="cpu", train={"epochs": 1, "precision": "fp32"}, output=tmp_path / "run",
    )  # fmt: skip
    _, _, galleries = _evaluated(tmp_path / "run", tmp_path / "out")
    assert "Attention is not shown" in galleries[0]["about"]
    assert len(galleries[0]["tiles"][0]["images"]) == 1


def test_the_task_and_the_dataset_of_a_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task with classes need not return logits of them: `ordinal` has an output for each border."""
    pytest.importorskip("petune_ordinal")
    names = ["a", "b", "c", "d"]
    for i, name in enumerate(names):
        (tmp_path / "grades" / name).mkdir(parents=True)
        Image.fromarray(np.full((16, 16, 3), 60 * i, np.uint8)).save(tmp_path / "grades" / name / "x.png")
    adapter, _ = saved_run(tmp_path / "base", "linear")
    task = {"name": "ordinal", "options": {}, "state": {}, "target": {"kind": "class", "names": names}}
    backbone = json.loads((adapter / "adapter_config.json").read_text())["metadata"]["backbone"]
    about = {"dataset": "shapes,count=9", "classes": names, "backbone": {**backbone, "initial_classes": 3}}
    run = changed(adapter, tmp_path / "run", task=task, **about)
    evaluation = petune.evaluate(run, dataset=f"folder:{tmp_path / 'grades'}", device="cpu")
    assert set(evaluation.metrics) == {"mae", "kappa", "top1"}
    assert (evaluation.num_images, evaluation.top1, evaluation.top5) == (4, evaluation.metrics["top1"], None)
    request = EvalRequest(run, "test", f"folder:{tmp_path / 'grades'}", None, 4)
    predictor = Predictor(run, device="cpu")
    rows = evaluate_images(predictor, select_images(predictor, request), 4).rows
    assert {row.prediction for row in rows} <= set(names)
    assert [row.is_wrong for row in rows] == [row.prediction != row.target for row in rows]
    monkeypatch.setenv("PETUNE_PLUGINS", "petune-ordinal")
    with pytest.raises(petune.PluginError, match=r"dataset 'shapes'.*pip install petune-shapes"):
        petune.evaluate(run, device="cpu")
    monkeypatch.setenv("PETUNE_PLUGINS", "none")
    with pytest.raises(petune.PluginError, match=r"task 'ordinal'.*pip install petune-ordinal"):
        petune.evaluate(run, device="cpu")


class Says(petune.Task[petune.TaskConfig]):
    """A task that predicts what it is told, and has another number of outputs than there are names."""

    says: Any = None

    def num_outputs(self) -> int:
        return 5

    def predict(self, outputs: torch.Tensor) -> list[Any]:
        return [self.says] * len(outputs)


def test_a_task_of_a_plugin_may_predict_anything() -> None:
    values = {"class": torch.tensor([1]), "multi_hot": torch.tensor([[0, 1]]), "number": torch.tensor([[2.0, 3.0]]),
              "mask": torch.zeros(1, 4, 4, dtype=torch.uint8)}  # fmt: skip
    everything = ["b", "unsure", 3, 2.5, None, True, {}, {"b": 0.9, "a": 0.1}, {"b": 7.0}, {"a": 1}, {"c": [1]}, [],
                  ["b"], ["x"], [1, 2], np.float32(2), torch.ones(2), {1: "x"}, ("b", 2)]  # fmt: skip
    for kind, targets in values.items():
        task = type("Task", (Says,), {"target_kind": kind})()
        task.bind(Target(kind, ("a", "b")), {})
        rows = []
        for task.says in everything:
            pixels = (4, 4) if kind == "mask" else ()
            rows += image_rows(task, ["x"], torch.zeros(1, 5, *pixels), targets, torch.tensor([0.5]))
        table = table_of(rows)
        assert len(to_csv(table).decode().splitlines()) == len(everything) + 1
        assert {"image", "loss"} < {*table.column_names}
        compared = {repr(says) for says, row in zip(everything, rows, strict=True) if row.is_wrong is not None}
        assert (
            compared
            == {
                "class": {"'b'", "{'b': 0.9, 'a': 0.1}", "{'a': 1}"},
                "multi_hot": {"{}", "{'b': 0.9, 'a': 0.1}", "{'a': 1}", "[]", "['b']"},
                "number": {"{'b': 0.9, 'a': 0.1}", "[1, 2]", "tensor([1., 1.])"},
                "mask": set(),
            }[kind]
        )
        assert table["loss"].to_pylist() == [0.5] * len(everything)


def test_ordinal_from_training_to_its_table(tables: Path, tmp_path: Path) -> None:
    classes = ["image,grade", *(f"{i}.png,{(37 * i) % 256 // 64}" for i in range(60))]
    (tables / "grades.csv").write_text("\n".join(classes))
    _run(f"table:{tables / 'grades.csv'},label=grade", tmp_path / "run", task="ordinal")
    evaluation, rows, galleries = _evaluated(tmp_path / "run", tmp_path / "out")
    right = [row["label"] == row["prediction"] for row in rows]
    assert [row["correct"] for row in rows] == right
    assert evaluation["top1"] == evaluation["metrics"]["top1"] == pytest.approx(100 * sum(right) / len(right))
    assert (evaluation["top5"], evaluation["bins"]) == (None, [])
    assert [sum(row) for row in evaluation["confusion"]] == [row["num_images"] for row in evaluation["classes"]]
    assert galleries[0]["title"] == "Worst mistakes"
    assert not (tmp_path / "out" / "reliability.svg").exists()
    prediction, *_ = petune.predict(tmp_path / "run", tables / "0.png", device="cpu")
    assert prediction.output in {"0", "1", "2", "3"}
    assert csv_text([prediction]) == f"image,prediction,error\n{tables / '0.png'},{prediction.output},"
