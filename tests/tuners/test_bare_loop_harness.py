"""Every tuner trains the same in a loop of one's own as in petune's, and a call that it needs is not forgotten."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import petune
from petune.data.dataset import Dataset, Split, Target
from petune.data.preprocess import Preprocess
from petune.plugin_dev.tiny_models import tiny_timm
from petune.training.config import TrainConfig
from petune.training.job import TrainJob
from petune.training.loop import Trainer
from petune.training.randomness import step_seed
from petune.training.stop import StopFlag
from petune.training.task_registry import fitted_task
from tests.sampling import sampled

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")
STEPS = 3
SEED = 5
LR = 1e-2
CALLS = ("on_train_start", "loss", "on_step_end")
PEFT_TYPES: dict[str, dict[str, Any]] = {
    "peft:adalora": {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 1},
    "peft:boft": {"boft_block_size": 4},
    "peft:ia3": {},
    "peft:loha": {"module_dropout": 0.3},
    "peft:lokr": {"rank_dropout": 0.3},
    "peft:lora": {"lora_dropout": 0.3},
    "peft:oft": {"oft_block_size": 4},
    "peft:pvera": {},
    "peft:vera": {},
}
WITH_DROPOUT: dict[str, dict[str, Any]] = {
    "dora": {"lora_dropout": 0.3},
    "lora": {"lora_dropout": 0.3},
    "vpt": {"dropout": 0.3},
}
"""Options that draw random numbers in each step."""

TUNERS = [record.name for record in petune.list_tuners() if record.name != "peft"] + list(PEFT_TYPES)
SAMPLE = {"adaptformer", "l2sp", "peft:adalora"}
"""Tuners that every run of the tests tries; `make test-all` tries all."""


def attached(name: str) -> petune.Attachment:
    torch.manual_seed(SEED)
    options = PEFT_TYPES.get(name) or WITH_DROPOUT.get(name, {})
    return petune.attach(tiny_timm(), name, **options)


def dataset() -> Dataset:
    """Return three batches of six images."""
    pixels = np.random.default_rng(0).integers(0, 256, (18 + 6, 16, 16, 3), dtype=np.uint8)
    labels = np.arange(len(pixels)) % 3
    train, test = Split.of(pixels[:18], labels[:18]), Split.of(pixels[18:], labels[18:])
    return Dataset("noise", Target("class", ("a", "b", "c")), "made", "none", train, test, test).validated()


def trainer(att: petune.Attachment, directory: Path) -> Trainer:
    data = dataset()
    config = TrainConfig(
        epochs=1,
        batch_size=6,
        lr=LR,
        weight_decay=att.recipe.weight_decay,
        optimizer="adamw",
        schedule="constant",
        warmup=0.0,
        augment="none",
        grad_clip=None,
        precision="fp32",
    )
    preprocess = Preprocess(16, *data.train.channel_statistics())
    device = torch.device("cpu")
    job = TrainJob(att, fitted_task("auto", data), data, preprocess, config, device, directory, seed=SEED, keep="last")
    return Trainer(job, stop=StopFlag())


def values(att: petune.Attachment) -> dict[str, Tensor]:
    return {key: p.detach().clone() for key, p in {**att.tuned, **att.head}.items()}


def train_bare(att: petune.Attachment, batches: list[tuple[Tensor, Tensor]], calls: tuple[str, ...] = CALLS) -> None:
    """Run the loop of the README, with the calls that are asked for."""
    model = att.model
    optimizer = torch.optim.AdamW(att.param_groups(), lr=LR)
    if "on_train_start" in calls:
        att.on_train_start(STEPS)
    model.train()
    for step, (images, labels) in enumerate(batches):
        torch.manual_seed(step_seed(SEED, step))  # as petune's trainer draws its dropout
        loss = nn.functional.cross_entropy(model(images), labels)
        if "loss" in calls:
            loss = loss + att.loss(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if "on_step_end" in calls:
            att.on_step_end(step)
    model.eval()


@pytest.mark.parametrize("name", sampled(TUNERS, lambda name: name in SAMPLE))
def test_a_bare_loop_trains_as_petune_does_and_needs_the_calls_that_matter(name: str, tmp_path: Path) -> None:
    att = attached(name)
    initial = values(att)
    by_petune = trainer(att, tmp_path)
    batches = [(batch.x_BCHW, batch.y_B) for batch in by_petune.batches.epoch(0)]
    assert len(batches) == STEPS
    by_petune.fit()
    expected = values(att)
    assert any(not torch.equal(expected[key], t) for key, t in initial.items())

    att = attached(name)
    train_bare(att, batches)
    torch.testing.assert_close(values(att), expected, rtol=0, atol=1e-6)

    for forgotten in CALLS:
        att = attached(name)
        calls = tuple(call for call in CALLS if call != forgotten)
        if forgotten in att.tuner.training_calls:
            with pytest.raises(petune.AttachError, match=rf"att\.{forgotten}\("):
                train_bare(att, batches, calls)
        else:
            train_bare(att, batches, calls)
            torch.testing.assert_close(values(att), expected, rtol=0, atol=1e-6)
