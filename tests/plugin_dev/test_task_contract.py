"""The contract of tasks: built-in ones meet it, and each property catches a broken task."""

from __future__ import annotations

import inspect
import sys
import textwrap
from typing import Any

import pytest
import torchmetrics
from torch import Tensor
from torch.nn import functional as F

import petune
from petune.plugin_dev.task_contract import PROPERTIES, examine_task
from petune.training.task_registry import list_tasks
from petune.training.tasks.classification import Classification, ClassificationConfig

BUILT_IN = [record.name for record in list_tasks() if record.is_own]


class Sound(Classification):
    """Classification, from which each case differs in one thing."""


class Tuples(Sound):
    def fit(self, train: petune.Split, target: petune.Target) -> dict[str, Any]:
        return {"weights": (1.0, 2.0)}


class Mean(Sound):
    def loss(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        return super().loss(outputs, targets, label_smoothing).mean()


class Constant(Sound):
    def loss(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        return super().loss(outputs, targets, label_smoothing) * 0


class Centered(Sound):
    def loss(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        return super().loss(outputs - outputs.mean(0), targets, label_smoothing)


class InPlace(Sound):
    def loss(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        loss_B = super().loss(outputs, targets, label_smoothing)
        if not targets.is_floating_point():
            targets.fill_(0)
        return loss_B


class Upwards(Sound):
    def loss(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        same = outputs.detach() * 2 - outputs  # the same value, with the opposite gradient
        return super().loss(same, targets, label_smoothing)


class Nameless(Sound):
    def new_meter(self) -> Any:
        meter = super().new_meter()
        meter.metrics = {"accuracy": meter.metrics["top1"]}
        return meter


class LastBatch(petune.TorchMeter):
    def update(self, outputs: Tensor, targets: Tensor) -> None:
        for metric in self.metrics.values():
            metric.reset()
        super().update(outputs, targets)


class Forgetful(Sound):
    def new_meter(self) -> Any:
        return LastBatch(super().new_meter().metrics)


class Downwards(Sound):
    def bind(self, target: petune.Target, state: dict[str, Any]) -> None:
        super().bind(target, state)
        self.metrics = (petune.Metric(name="top1", label="top-1", higher_is_better=False),)


class First(Sound):
    def predict(self, outputs: Tensor) -> list[Any]:
        return list(super().predict(outputs)[:1])


class Silent(Sound):
    def predict(self, outputs: Tensor) -> list[Any]:
        return [None] * len(outputs)


class Tensors(Sound):
    def predict(self, outputs: Tensor) -> list[Any]:
        return list(outputs)


class Sharp(Sound):
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:  # type: ignore[override]
        return super().loss(outputs, targets)


class Forgotten(Sound):
    def calibrate(self, meter: Any) -> dict[str, Any]:
        return {} if meter is None else {"best": max(meter.compute().values())}


class Hidden(Sound):
    def fit(self, train: petune.Split, target: petune.Target) -> dict[str, Any]:
        self.scale = 2.0
        return {}

    def loss(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        return super().loss(outputs * getattr(self, "scale", 1.0), targets, label_smoothing)


class Rough(Sound):
    def loss(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        return super().loss(outputs, targets)


class OnlyClasses(Sound):
    def loss(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        return F.nll_loss(outputs.log_softmax(1), targets, reduction="none") * (1 + label_smoothing)


CASES = [
    (Tuples, "state"), (Mean, "loss per image"), (Constant, "gradients"), (Centered, "independent images"),
    (InPlace, "unchanged targets"), (Upwards, "learning"), (Nameless, "metric values"), (Forgetful, "metrics by batch"),
    (Downwards, "direction"), (First, "predictions"), (Forgotten, "calibration"), (Hidden, "restored"),
    (Silent, "predictions"), (Tensors, "predictions"), (Sharp, "loss per image"), (Rough, "label smoothing"),
    (OnlyClasses, "mixing"),
]  # fmt: skip


def test_every_property_has_a_case() -> None:
    assert {name for _, name in CASES} == {prop.name for prop in PROPERTIES}


@pytest.mark.parametrize(("task", "name"), CASES, ids=[task.__name__ for task, _ in CASES])
def test_a_broken_task_is_caught(task: type[Sound], name: str) -> None:
    findings = list(examine_task(task(ClassificationConfig())))
    assert name in [finding.name for finding in findings if finding.problem]


@pytest.mark.parametrize("name", [*BUILT_IN, "ordinal"])
def test_registered_tasks_meet_the_contract(name: str) -> None:
    assert petune.check_task(name) == [prop.name for prop in PROPERTIES]


def test_a_violation_names_the_property() -> None:
    with pytest.raises(petune.ContractViolation, match="loss per image"):
        petune.check_task(Mean(ClassificationConfig()))


def test_names_that_nobody_registered_are_refused() -> None:
    with pytest.raises(petune.UnknownName):
        petune.check_task("clasification")


def test_the_plugin_in_the_manual_meets_the_contract() -> None:
    manual = inspect.getdoc(sys.modules["petune.training.task"]) or ""
    code = textwrap.dedent(manual[manual.index("    class CountConfig") : manual.index("    # pyproject.toml")])
    names: dict[str, Any] = {"petune": petune, "torchmetrics": torchmetrics, "__name__": "petune_count"}
    exec(code, names)
    for options in ({}, {"power": 2}):
        assert petune.check_task(names["Count"](**options)) == [prop.name for prop in PROPERTIES]
