"""A toy dataset, a toy model of which everything trains, and trainers of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from petune.data.dataset import Dataset, Split, Target
from petune.data.preprocess import Preprocess
from petune.training.config import TrainConfig
from petune.training.events import Event
from petune.training.job import TrainJob
from petune.training.loop import Trainer
from petune.training.stop import StopFlag
from petune.training.task_registry import fitted_task

SIDE, CLASSES = 8, 3
DEFAULTS = {
    "epochs": 2, "batch_size": 6, "eval_batch_size": 16, "lr": 0.05, "weight_decay": 0.01,
    "optimizer": "adamw", "warmup": 0.0, "augment": "paddle_study", "precision": "fp32", "log_every": 2,
}  # fmt: skip


class Toy(nn.Module):
    """A linear layer with BatchNorm and dropout: everything that a resume can get wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 12), nn.BatchNorm1d(12), nn.Dropout(0.3))
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        logits_BC: Tensor = self.head(self.body(x_BCHW))
        return logits_BC


@dataclass
class Everything:
    """The part of an Attachment that Trainer uses, for a model of which everything trains."""

    model: nn.Module
    tuned: dict[str, nn.Parameter] = field(default_factory=dict)
    head: dict[str, nn.Parameter] = field(default_factory=dict)
    sites: Any = field(default_factory=lambda: SimpleNamespace(blocks=(), parts={}))
    checks: int = 0
    name: str = "toy"
    is_calibrated: bool = True

    def __post_init__(self) -> None:
        parameters = dict(self.model.named_parameters())
        self.head = {key: p for key, p in parameters.items() if key.startswith("head.")}
        self.tuned = {key: p for key, p in parameters.items() if key not in self.head}

    def train(self) -> None:
        self.model.train()

    def check_gradients(self, *, under_way: bool = False) -> None:
        self.checks += 1

    def loss(self, step: int) -> Tensor | float:
        return 0.0

    def aux_loss(self) -> Tensor | float:
        return 0.0

    def on_train_start(self, total_steps: int) -> None: ...

    def on_step_end(self, step: int) -> None: ...


def toy_attachment(seed: int = 0) -> Everything:
    """Return the toy model with initial values from `seed`."""
    torch.manual_seed(seed)
    return Everything(Toy())


def toy_dataset() -> Dataset:
    """Return 26 training, 9 val and 12 test images; the class is the bright quadrant, with noise."""

    def split(count: int, seed: int) -> Split:
        generator = np.random.default_rng(seed)
        labels = np.arange(count) % CLASSES
        images = generator.integers(0, 100, (count, SIDE, SIDE, 3), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[4 * (label // 2) :, 4 * (label % 2) :] += 60
        return Split.of(images, labels)

    target = Target("class", ("a", "b", "c"))
    return Dataset("toy", target, "made", "none", split(26, 0), split(9, 1), split(12, 2)).validated()


MakeTrainer = Callable[..., Trainer]


@pytest.fixture
def make_trainer(tmp_path: Path) -> MakeTrainer:
    """Return `make_trainer(attachment, directory=…, stop=…, on_event=…, keep=…, lr=…, …)`."""

    def make(
        attachment: Any,
        *,
        directory: Path = tmp_path,
        dataset: Dataset | None = None,
        stop: StopFlag | None = None,
        on_event: Callable[[Event], None] = lambda event: None,
        keep: Any = "best",
        task: str = "classification",
        seed: int = 3,
        **train: Any,
    ) -> Trainer:
        data = toy_dataset() if dataset is None else dataset
        directory.mkdir(exist_ok=True)
        job = TrainJob(
            attachment=attachment,
            task=fitted_task(task, data),
            dataset=data,
            preprocess=Preprocess(SIDE, *data.train.channel_statistics()),
            config=TrainConfig.build(DEFAULTS | train),
            device=torch.device("cpu"),
            directory=directory,
            seed=seed,
            keep=keep,
        )
        return Trainer(job, stop=stop or StopFlag(), on_event=on_event)

    return make


@pytest.fixture
def toy() -> Callable[[int], Everything]:
    """Return a function that makes the toy attachment from the seed of its initial values."""
    return toy_attachment
