"""Runs of multi-label classification and regression on real digits, from the dataset to the saved adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cifar_tables import PARQUET, read_cifar, write_tables
from safetensors.torch import load_file

import petune
from petune.base.errors import ConfigError, DataError, Stopped
from petune.runner.result import RunResult
from petune.runner.run_adapter import read_run_adapter
from petune.runner.run_data import prepare_data
from petune.serving.restore import restore
from petune.training.events import Event, StepDone
from petune.training.task_registry import restore_task
from tests.fake_plugin import fake
from tests.program import call
from tests.sampling import sampled

__all__ = ["fake"]
SHORT = {
    "backbone": "vit_nano", "weights": "none", "backbone_options": {"depth": 2, "embed_dim": 24, "num_heads": 2},
    "image_size": 16, "device": "cpu", "method": "adaptformer:bottleneck=4",
}  # fmt: skip
TRAIN = {"epochs": 3, "batch_size": 16, "precision": "fp32", "lr": 0.02}
KINDS = {"labels": "multi_label", "number": "regression", "numbers": "regression"}
MAIN = {"multi_label": "map", "regression": "mae"}
TUNERS = [t.name for t in petune.list_tuners() if t.name != "peft"]  # it needs a type


@pytest.fixture(autouse=True)
def quadrants(fake: Any) -> None:
    fake("petune-fake", {"quadrants": "tests.quadrants:Quadrants"}, group="petune.datasets")


def config(output: Path, targets: str = "labels", **fields: Any) -> petune.RunConfig:
    train = {**TRAIN, **fields.pop("train", {})}
    dataset = fields.pop("dataset", f"quadrants,targets={targets}")
    return petune.RunConfig.build({**SHORT, "dataset": dataset, "train": train, "output": output, **fields})


def trained(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("targets", sampled(KINDS, "number".__ne__))
def test_a_run_trains_shows_its_metrics_and_records_what_prediction_needs(targets: str, tmp_path: Path) -> None:
    settings = config(tmp_path / "run", targets)
    result = petune.run(settings)
    main = MAIN[KINDS[targets]]
    assert (result.task, result.metric_info[0].name) == (KINDS[targets], main)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    every = {line["epoch"]: line[f"val_{main}"] for line in lines if f"val_{main}" in line}
    better = max if main == "map" else min
    assert result.val_metrics is not None
    assert result.val_metrics[main] == every[result.epoch] == better(every.values())
    assert main in (tmp_path / "run" / "adapter" / "README.md").read_text()
    saved = read_run_adapter(tmp_path / "run").config["metadata"]
    task, model = restore_task(saved), restore(tmp_path / "run", None).backbone.model.eval()
    test = prepare_data(settings).test
    size = saved["preprocess"]["image_size"]
    preprocess = petune.data.Preprocess(size, saved["preprocess"]["mean"], saved["preprocess"]["std"])
    pixels = preprocess.normalize(preprocess.pixels(test, np.arange(len(test)), torch.device("cpu")))
    with torch.no_grad():
        outputs = model(pixels)
    meter = task.new_meter()
    meter.update(outputs, torch.from_numpy(test.targets))
    assert meter.compute() == pytest.approx(result.metrics, rel=1e-4)  # with the saved thresholds, mean and deviation
    predictions = task.predict(outputs)
    assert len(predictions) == len(test)
    if targets == "labels":
        thresholds = np.array(task.state["thresholds"])
        found = np.array([[name in labels for name in task.target.names] for labels in predictions])
        assert (found == (outputs.double().sigmoid().numpy() >= thresholds)).all()
        assert result.metrics["classes_counted"] == 4
    else:
        errors = [abs(numbers["count"] - y) for numbers, y in zip(predictions, test.targets[:, 0], strict=True)]
        assert np.mean(errors) == pytest.approx(result.metrics["mae" if targets == "number" else "mae/count"], rel=1e-4)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("targets", "least"), [("labels", 80), ("number", 0.85)])
def test_more_epochs_learn_the_task(targets: str, least: float, tmp_path: Path) -> None:
    """Chance is about 50 % for the labels and an R² of 0 for the number."""
    fields = {"weights": "default", "backbone_options": {}, "image_size": 32, "train": {"epochs": 5, "lr": 0.005}}
    result = petune.run(config(tmp_path / "run", dataset=f"quadrants,targets={targets},count=600", **fields))
    assert result.metrics["map" if targets == "labels" else "r2"] > least


@pytest.mark.parametrize(
    ("targets", "task"),
    sampled(
        [
            *(("labels", f"multi_label:loss={loss}") for loss in ("asl", "poly", "db", "zlpr", "twoway")),
            ("labels", "multi_label:pos_weight={one: 2},threshold=per_class"),
            ("numbers", "regression:loss=huber,delta=0.5"),
        ],
        lambda row: "per_class" in row[1] or "huber" in row[1],
    ),
)
def test_every_loss_trains(targets: str, task: str, tmp_path: Path) -> None:
    result = petune.run(config(tmp_path / "run", targets, task=task, train={"epochs": 2}))
    first, last = (json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-2:])
    assert last["train_loss"] < first["train_loss"]
    recorded = read_run_adapter(tmp_path / "run").config["metadata"]["task"]
    assert (recorded["name"], len(recorded["options"])) == (result.task, 6 if targets == "labels" else 2)
    if "per_class" in task:
        assert recorded["options"]["pos_weight"] == {"one": 2.0}
        assert len(set(recorded["state"]["thresholds"])) > 1


@pytest.mark.parametrize(
    ("tuner", "targets"),
    sampled(
        [(tuner, targets) for tuner in TUNERS for targets in ("labels", "numbers")],
        {("lora", "labels"), ("vpt", "numbers")}.__contains__,
    ),
)
@pytest.mark.filterwarnings("ignore:VisionTransformer reads the weights")
def test_every_tuner_trains_for_every_task(tuner: str, targets: str, tmp_path: Path) -> None:
    result = petune.run(config(tmp_path / "run", targets, method=tuner, train={"epochs": 1, "batch_size": 40}))
    assert np.isfinite(result.metrics[MAIN[KINDS[targets]]])
    assert read_run_adapter(tmp_path / "run").config["metadata"]["task"]["name"] == KINDS[targets]


@pytest.mark.parametrize(
    ("targets", "mixup"),
    sampled([(t, mixup) for t in ("labels", "numbers") for mixup in (0.0, 0.5)], ("labels", 0.5).__eq__),
)
def test_micro_batches_do_not_change_a_run(targets: str, mixup: float, tmp_path: Path) -> None:
    for name, micro in (("whole", None), ("parts", 5)):
        train = {"epochs": 1, "micro_batch_size": micro, "mixup": mixup}
        petune.run(config(tmp_path / name, targets, method="lora", train=train))
    whole, parts = trained(tmp_path / "whole"), trained(tmp_path / "parts")
    for key, tensor in whole.items():
        torch.testing.assert_close(parts[key], tensor, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("targets", sampled(["labels", "numbers"], "labels".__eq__))
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(targets: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"train": {"mixup": 0.3, "epochs": 2}, "method": "vpt"}
    whole = petune.run(config(tmp_path / "whole", targets, **options))

    def stop_at_seven(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 7:
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, Stopped)):
        petune.run(config(tmp_path / "parts", targets, **options), watch=stop_at_seven)
    parts = petune.run(config(tmp_path / "parts", targets, resume=True, **options))
    assert (parts.metrics, parts.val_metrics, parts.epoch) == (whole.metrics, whole.val_metrics, whole.epoch)
    for key, tensor in trained(tmp_path / "whole").items():
        assert torch.equal(trained(tmp_path / "parts")[key], tensor)
    states = [read_run_adapter(tmp_path / n).config["metadata"]["task"]["state"] for n in ("whole", "parts")]
    assert states[0] == states[1]


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"dataset": "quadrants,targets=numbers,wrong=missing"}, DataError, r"not finite.*image 5.*count"),
        ({"dataset": "quadrants,targets=numbers,wrong=constant"}, DataError, "count is 7 for every training image"),
        ({"task": "regression"}, ConfigError, r"regression.*'number'.*'multi_hot'.*multi_label"),
        ({"task": "classification"}, ConfigError, r"classification.*'class'.*'multi_hot'.*multi_label"),
        ({"task": "multi_label:pos_weight={four: 2}"}, ConfigError, "no such class: four"),
        ({"task": "multi_label:loss=zlpr", "train": {"mixup": 0.2}}, ConfigError, "zlpr"),
        ({"task": "multi_label:loss=twoway", "train": {"micro_batch_size": 4}}, ConfigError, "whole batch"),
        ({"dataset": "quadrants,targets=number", "train": {"cutmix": 0.2}}, ConfigError, "cutmix"),
        ({"dataset": "quadrants,targets=number", "shots": 2}, ConfigError, "shots"),
        ({"train": {"choose": "macro_f2"}}, ConfigError, "macro_f1"),
    ],
)  # fmt: skip
def test_bad_input_is_an_error_before_a_model_is_built(
    fields: dict[str, Any], error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model is built")

    monkeypatch.setattr("petune.runner.prepare.create_backbone", refuse)
    with pytest.raises(error, match=message):
        petune.run(config(tmp_path / "run", **fields))


def test_another_metric_chooses_the_epoch(tmp_path: Path) -> None:
    result = petune.run(config(tmp_path / "run", train={"choose": "macro_f1"}))
    assert result.metric_info[0].name == "macro_f1"
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    every = [line["val_macro_f1"] for line in lines if "val_macro_f1" in line]
    assert (result.val_metrics or {})["macro_f1"] == max(every)


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text(json.dumps({**SHORT, "train": TRAIN, "dataset": "quadrants,targets=number"}))
    words = ("--task", "regression:loss=huber", "--output", tmp_path / "run")
    done = call("run", "--config", tmp_path / "run.yaml", *words, capture=capsys)
    assert done.code == 0, done.err
    assert "MAE on test" in done.out
    assert "R² on test" in done.out
    assert RunResult.read(tmp_path / "run").task == "regression"


@pytest.mark.exhaustive
@pytest.mark.parametrize("targets", sampled(["labels", "numbers"], "numbers".__eq__))
def test_comparisons_and_sweeps_show_the_metrics(targets: str, tmp_path: Path) -> None:
    run = config(tmp_path / "unused", targets, train={"epochs": 1}).model_dump(exclude={"output", "method", "resume"})
    table = petune.compare(methods=["linear", "bitfit"], run=run, output=tmp_path / "two")
    main = MAIN[KINDS[targets]]
    assert table.metric_info[0].name == main
    page = (tmp_path / "two" / "compare.md").read_text()
    assert table.metric_info[0].label in page
    assert "MAE of sum" not in page  # metrics of one class or number are not shown


@pytest.mark.skipif(not PARQUET.exists(), reason="CIFAR-10 is not here")
@pytest.mark.parametrize(
    ("table", "options", "shown"),
    sampled(
        [("pairs", "labels=labels,separator=|", "micro-F1 on test"), ("animals", "target=animals", "R² on test")],
        lambda row: row[0] == "pairs",
    ),
)
def test_tables_of_real_images_from_the_command_line(
    table: str, options: str, shown: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, names = read_cifar(PARQUET, 100)
    write_tables(images, names, tmp_path, count=90, seed=0)
    (tmp_path / "run.yaml").write_text(json.dumps({**SHORT, "train": {**TRAIN, "epochs": 1}}))
    words = ("--config", tmp_path / "run.yaml", "--dataset", f"table:{tmp_path}/{table}.csv,{options}")
    done = call("run", *words, "--output", tmp_path / "run", capture=capsys)
    assert done.code == 0, done.err
    assert shown in done.out
