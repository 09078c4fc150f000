"""Tasks: the loss of each image, metrics by name, plugins, and what a run refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import petune
from petune.base.errors import ConfigError, PluginError, UnknownName
from petune.base.metric import LOSS, Metric, SplitMetrics
from petune.data.target import Target
from petune.runner.run_adapter import read_run_adapter
from petune.training.batch_loss import check_task_options, image_losses
from petune.training.config import TrainConfig
from petune.training.progress import Progress
from petune.training.state import ResumableState
from petune.training.task import choose_metrics
from petune.training.task_registry import build_task, fitted_task, restore_task, task_for
from tests.fake_plugin import fake
from tests.program import call
from tests.training.conftest import toy_dataset

__all__ = ["fake"]
GROUP = "petune.tasks"
Make = Callable[..., Any]
SHORT = {
    "backbone": "vit_nano", "weights": "none", "backbone_options": {"depth": 2, "embed_dim": 24, "num_heads": 2},
    "dataset": "digits", "shots": 5, "device": "cpu", "method": "linear",
    "train": {"epochs": 3, "precision": "fp32", "lr": 0.01},
}  # fmt: skip
MARGIN = """
import petune
import torch
from torchmetrics import MeanMetric

class MarginConfig(petune.TaskConfig):
    margin: float = 1.0

class Gap(MeanMetric):
    def update(self, outputs, targets):
        super().update(1 - outputs.softmax(1).gather(1, targets[:, None]))

class Margin(petune.Task[MarginConfig]):
    target_kind = "class"
    metrics = (petune.Metric(name="gap", label="gap", higher_is_better=False),)

    def fit(self, train, target):
        return {"counts": [int((train.targets == c).sum()) for c in range(len(target.names))]}

    def loss(self, outputs, targets, label_smoothing=0.0):
        return torch.nn.functional.multi_margin_loss(outputs, targets, margin=self.config.margin, reduction="none")

    def new_meter(self):
        return petune.TorchMeter({"gap": Gap()})
"""


@pytest.fixture
def margin(fake: Any) -> None:
    fake("petune-fake", {"margin": "petune_fake_margin:Margin"}, MARGIN, group=GROUP)


def _classification(classes: int = 3) -> Any:
    return task_for("classification", Target("class", tuple(map(str, range(classes)))), "toy")


def test_tasks_are_listed_without_an_import(margin: None) -> None:
    records = {record.name: record for record in petune.list_tasks()}
    assert records["classification"].is_own
    assert (records["margin"].distribution, records["margin"].state) == ("petune-fake", "ok")


def test_the_loss_of_classification_is_the_cross_entropy_of_each_image() -> None:
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    losses = _classification().loss(logits, labels, 0.1)
    expected = torch.stack([F.cross_entropy(z, y, label_smoothing=0.1) for z, y in zip(logits, labels, strict=True)])
    torch.testing.assert_close(losses, expected)


@pytest.mark.parametrize(("classes", "shown"), [(2, []), (5, []), (6, ["top5"])])
def test_top_5_is_shown_with_more_than_five_classes(classes: int, shown: list[str]) -> None:
    names = [metric.name for metric in _classification(classes).metrics]
    assert names == ["top1", *shown, "macro_accuracy", "macro_f1"]


def test_a_plugin_task_trains_shows_its_metric_and_chooses_the_epoch(
    margin: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = petune.RunConfig.build({**SHORT, "task": "margin:margin=0.5", "output": tmp_path / "run"})
    result = petune.run(config)
    assert (result.task, result.top1, result.val_top1) == ("margin", None, None)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    gaps = {line["epoch"]: line["val_gap"] for line in lines if "val_gap" in line}
    assert result.val_metrics == {"gap": min(gaps.values())}
    assert gaps[result.epoch] == min(gaps.values())
    assert ("gap on test", f"{result.metrics['gap']:.4g}") in result.facts()
    assert "gap on test" in (tmp_path / "run" / "adapter" / "README.md").read_text()
    task = restore_task(read_run_adapter(tmp_path / "run").config["metadata"])
    assert (task.name, task.config.margin, sum(task.state["counts"])) == ("margin", 0.5, 50)
    monkeypatch.chdir(tmp_path)
    done = call("report", "run", "--output", "page.html", capture=capsys)
    assert done.code == 0, done.err
    assert "gap on test (lower is better)" in (tmp_path / "page.html").read_text()


@pytest.mark.exhaustive
def test_a_comparison_and_a_sweep_sort_by_the_metric_of_the_task(margin: None, tmp_path: Path) -> None:
    run = {**SHORT, "task": "margin"}
    run.pop("method")
    table = petune.compare(methods=["linear", "bitfit"], run=run, output=tmp_path / "two")
    page = (tmp_path / "two" / "compare.md").read_text()
    first = min(table.rows, key=lambda row: row.mean["gap"]).method
    assert [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| ")][2] == first
    assert "Lower is better: gap" in page
    sweep = petune.sweep(search={"train.lr": [1e-5, 1e-2]}, run={**run, "method": "linear"}, output=tmp_path / "swept")
    values = [sweep.val(row) for row in sweep.rows]
    assert sweep.best == values.index(min(value for value in values if value is not None))


def test_another_metric_or_the_loss_can_choose_the_epoch() -> None:
    task = _classification(10)
    macro = ["macro_accuracy", "macro_f1"]
    assert [m.name for m in choose_metrics(task, None)] == ["top1", "top5", *macro]
    assert [m.name for m in choose_metrics(task, "top5")] == ["top5", "top1", *macro]
    assert choose_metrics(task, "loss") == (LOSS, *task.metrics)
    with pytest.raises(ConfigError, match="top1"):
        choose_metrics(task, "tpo1")


MAE = Metric(name="mae", label="MAE", higher_is_better=False)


@pytest.mark.parametrize(
    ("metric", "epochs", "best"),
    [
        (MAE, [(2.0, 1.0), (1.0, 2.0), (3.0, 0.5)], 2),
        (MAE, [(1.0, 1.0), (1.0, 0.9), (1.0, 0.9)], 3),
        (LOSS, [(2.0, 1.0), (1.0, 2.0), (3.0, 0.5)], 3),
        (MAE, [(float("nan"), 1.0), (5.0, 2.0), (float("nan"), 0.1)], 2),
    ],
)
def test_the_best_epoch_by_a_metric(metric: Metric, epochs: list[tuple[float, float]], best: int) -> None:
    state = ResumableState(torch.nn.Identity(), {}, None, "best", metric)  # type: ignore[arg-type]
    state.progress = Progress()
    for value, loss in epochs:
        state.progress.epochs.append({"val_loss": loss})
        values = {"mae": value} if value == value else {}
        state.record(SplitMetrics(values, loss, 9))
        state.progress.epoch += 1
    assert state.progress.best_epoch == best


def test_a_task_for_other_targets_is_refused_before_a_model_is_built(
    fake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = MARGIN.replace('target_kind = "class"', 'target_kind = "number"')
    fake("petune-fake", {"numbers": "petune_fake_numbers:Margin"}, code, group=GROUP)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model is built")

    monkeypatch.setattr("petune.runner.prepare.create_backbone", refuse)
    with pytest.raises(ConfigError, match=r"numbers.*'number'.*digits.*'class'.*classification"):
        petune.run(petune.RunConfig.build({**SHORT, "task": "numbers", "output": tmp_path / "run"}))
    assert not (tmp_path / "run").exists()


def test_unknown_tasks_options_and_metrics_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="classification"):
        build_task("clasification")
    with pytest.raises(ConfigError, match="no such key"):
        build_task("classification:colour=3")
    values = {**SHORT, "train": {"choose": "top_1"}, "output": tmp_path / "run"}
    with pytest.raises(ConfigError, match=r"top_1.*top1"):
        petune.run(petune.RunConfig.build(values))
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_resumed_with_another_task(margin: None, tmp_path: Path) -> None:
    petune.run(petune.RunConfig.build({**SHORT, "output": tmp_path / "run"}))
    (tmp_path / "run" / "result.json").unlink()
    record = json.loads((tmp_path / "run" / "inputs.json").read_text())
    assert record["task"]["name"] == "classification"
    with pytest.raises(petune.UsageError, match="task: 'auto' before, 'margin' now"):
        petune.run(petune.RunConfig.build({**SHORT, "task": "margin", "output": tmp_path / "run", "resume": True}))
    record["task"]["options"] = {"old": 1}
    (tmp_path / "run" / "inputs.json").write_text(json.dumps(record))
    with pytest.raises(petune.CheckpointError, match="the task has changed"):
        petune.run(petune.RunConfig.build({**SHORT, "output": tmp_path / "run", "resume": True}))


def test_an_adapter_that_records_no_task_is_of_classification() -> None:
    task = restore_task({"classes": ["cat", "dog"]})
    assert (task.name, task.target.names, task.num_outputs()) == ("classification", ("cat", "dog"), 2)


def test_a_loss_of_another_shape_is_the_plugins_fault(fake: Any) -> None:
    code = MARGIN.replace('reduction="none"', 'reduction="mean"')
    fake("petune-fake", {"mean": "petune_fake_mean:Margin"}, code, group=GROUP)
    task = task_for("mean", Target("class", ("a", "b")), "toy")
    with pytest.raises(PluginError, match="one loss per image"):
        image_losses(task, torch.randn(3, 2), torch.tensor([0, 1, 0]))


def test_options_that_do_not_go_with_a_task_are_refused(margin: None) -> None:
    task, train = task_for("margin", Target("class", ("a", "b", "c")), "toy"), toy_dataset().train
    for options in ({"label_smoothing": 0.1}, {"mixup": 0.2}, {"cutmix": 1.0}):
        with pytest.raises(ConfigError, match="margin"):
            check_task_options(task, TrainConfig.build(options), train, 1)
    task.needs_whole_batch = True
    for options, processes in (({"micro_batch_size": 4}, 1), ({}, 2)):
        with pytest.raises(ConfigError, match="whole batch"):
            check_task_options(task, TrainConfig.build(options), train, processes)
    weighted = replace(train, weights=np.ones(len(train)))
    with pytest.raises(ConfigError, match="weights"):
        check_task_options(_classification(), TrainConfig(mixup=0.2), weighted, 1)


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_weights_of_the_images_count_in_the_loss(
    micro_batch: int | None, make_trainer: Make, toy: Make, tmp_path: Path
) -> None:
    """Twice all weights is the same training; an image of weight 0 has no gradient."""
    data = toy_dataset()
    weights = np.arange(len(data.train), dtype=float)

    def gradients(factor: float | None, micro: int | None) -> list[torch.Tensor]:
        dataset = data
        if factor is not None:
            dataset = replace(data, train=replace(data.train, weights=factor * weights))
        att = toy(0)
        att.model.body[2] = torch.nn.Identity()
        att.model.body[3] = torch.nn.Identity()
        att = type(att)(att.model)
        options = {"micro_batch_size": micro, "grad_clip": None}
        trainer = make_trainer(att, dataset=dataset, directory=tmp_path / f"{factor}-{micro}", **options)
        trainer.progress.micro_batch = micro or 0
        batch = next(trainer.batches.epoch(0))
        scale = np.ones(len(weights)) if factor is None else weights / weights.mean()
        losses = F.cross_entropy(att.model(batch.x_BCHW), batch.y_B, reduction="none")
        expected = (losses * torch.from_numpy(scale[batch.positions]).float()).mean()
        wanted = torch.autograd.grad(expected, list(att.model.head.parameters()))
        trainer.step(batch)
        found = [p.grad for p in att.model.head.parameters()]
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other)
        return found

    for one, other in zip(gradients(1.0, micro_batch), gradients(2.0, micro_batch), strict=True):
        torch.testing.assert_close(one, other)
    gradients(None, micro_batch)


def test_auto_is_the_task_of_the_targets() -> None:
    assert fitted_task("auto", toy_dataset()).name == "classification"
