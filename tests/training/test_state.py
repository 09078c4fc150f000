"""Checkpoints that older versions wrote still load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

import petune
from petune.backbones.create import create_backbone
from petune.base.metric import Metric
from petune.training.checkpoint import newest_checkpoint
from petune.training.config import TrainConfig
from petune.training.optim import create_optimizer
from petune.training.state import ResumableState
from tests.recorded_weights import needs_recorded_weights

GOLDEN = Path(__file__).parents[1] / "golden" / "v0"
METHODS = {"adaptformer": "adaptformer:variant=paddle_study,bottleneck=2", "vpt": "vpt:num_prompts=2"} | {
    "lora": "lora:r=2",
    "bitfit": "bitfit",
}


@needs_recorded_weights
@pytest.mark.parametrize("method", METHODS)
def test_an_old_checkpoint_restores_the_tensors_of_its_adapter(method: str) -> None:
    run = GOLDEN / method
    config = yaml.safe_load((run / "config.yaml").read_text())
    options = {"options": config["backbone_options"], "seed": config["seed"]}
    models = [create_backbone("vit_nano", weights="none", num_classes=10, **options).model for _ in range(2)]
    torch.manual_seed(99)
    att, saved = petune.attach(models[0], METHODS[method]), petune.load(models[1], run / "adapter")
    params = {**att.tuned, **att.head}
    train = TrainConfig(lr=0.01, weight_decay=0.0, optimizer="adamw")
    state = ResumableState(
        att.model,
        params,
        create_optimizer(params, set(), train),
        keep="best",
        metric=Metric(name="top1", label="top-1"),
    )
    checkpoint, problems = newest_checkpoint(run / "checkpoints")
    assert problems == []
    assert checkpoint is not None
    state.load(checkpoint)
    assert (state.progress.step, state.progress.precision) == (1, "fp32")
    assert state.progress.best_values == {name: state.progress.epochs[0][f"val_{name}"] for name in ("top1", "top5")}
    expected = saved.state()
    assert {key for key, tensor in att.state().items() if not torch.equal(tensor, expected[key])} == set()
