"""Memory: out of memory in an evaluation, batches that are too small for BatchNorm, models that must be freed."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import petune
from petune.base.errors import ConfigError, UsageError
from petune.runner.executors.executor import attempt
from petune.runner.run_config import RunConfig
from petune.training.loop import Trainer

RUN: dict[str, Any] = {
    "method": "linear", "backbone": "vit_nano", "weights": "none", "dataset": "digits", "shots": 3,
    "device": "cpu", "backbone_options": {"depth": 1, "embed_dim": 24},
}  # fmt: skip
TRAIN = {"epochs": 2, "batch_size": 10, "precision": "fp32", "augment": "none"}


def test_running_out_of_memory_in_evaluation_keeps_the_trained_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = petune.run(**RUN, train=TRAIN, output=tmp_path / "whole")
    original, steps = Trainer.evaluate, []

    def full(self: Trainer, part: Any) -> Any:
        if self.config.eval_batch_size > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, part)

    step = Trainer.step

    def counted(self: Trainer, batch: Any) -> Any:
        steps.append(1)
        return step(self, batch)

    monkeypatch.setattr(Trainer, "evaluate", full)
    monkeypatch.setattr(Trainer, "step", counted)
    with pytest.raises(torch.OutOfMemoryError):
        petune.run(**RUN, train=TRAIN, output=tmp_path / "run")
    assert len(steps) == 3
    done = petune.run(**RUN, train={**TRAIN, "eval_batch_size": 20}, output=tmp_path / "run", resume=True)
    assert len(steps) == 6
    assert (done.top1, done.val_top1) == (whole.top1, whole.val_top1)
    with pytest.raises(UsageError, match=r"train\.batch_size: 10 before, 5 now"):
        petune.run(**RUN, train={**TRAIN, "batch_size": 5}, output=tmp_path / "run", resume=True)


@pytest.mark.parametrize("sizes", [{"batch_size": 1}, {"batch_size": 6, "micro_batch_size": 1}])
def test_batchnorm_with_a_single_image_is_explained(sizes: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs at least two images"):
        petune.run(**RUN, head="bn_linear", train={**TRAIN, **sizes}, output=tmp_path / "run")


def test_batchnorm_trains_on_every_batch_of_a_small_split(tmp_path: Path) -> None:
    done = petune.run(**RUN, head="bn_linear", train={**TRAIN, "batch_size": 27}, output=tmp_path / "run")
    assert done.epochs == TRAIN["epochs"]


@pytest.mark.exhaustive
def test_models_of_earlier_runs_are_freed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else they would count in the peak memory of the next run of a comparison."""
    models: list[weakref.ref[nn.Module]] = []
    alive: list[int] = []
    original = Trainer.fit

    def seen(self: Trainer) -> Any:
        alive.append(sum(model() is not None for model in models))
        models.append(weakref.ref(self.model))
        return original(self)

    monkeypatch.setattr(Trainer, "fit", seen)
    gc.disable()
    try:
        for number in range(3):
            attempt(RunConfig.build({**RUN, "train": TRAIN, "output": tmp_path / str(number)}), lambda event: None)
    finally:
        gc.enable()
    assert alive == [0, 0, 0]
