"""Evaluation counts every image once, and leaves the model as it was."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from petune.base.errors import Stopped
from petune.base.metric import SplitMetrics
from petune.data.dataset import Dataset, Split, Target
from petune.data.preprocess import Preprocess
from petune.training.config import TrainConfig
from petune.training.evaluate import evaluate
from petune.training.job import TrainJob
from petune.training.stop import StopFlag
from petune.training.task_registry import task_for

CPU = torch.device("cpu")
PLAIN = Preprocess(1, (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))


class Table(nn.Module):
    """Looks up fixed logits by the image's red value."""

    def __init__(self, logits_NC: Tensor) -> None:
        super().__init__()
        self.logits_NC, self.seen, self.modes = logits_NC, list[int](), list[bool]()
        self.part = nn.Dropout()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        rows = x_BCHW[:, 0, 0, 0].round().long()
        self.seen += rows.tolist()
        self.modes.append(self.part.training)
        return self.logits_NC[rows]


def _toy(count: int, classes: int) -> tuple[Table, Split]:
    generator = torch.Generator().manual_seed(0)
    images = np.arange(count, dtype=np.uint8)[:, None, None, None].repeat(3, 3)
    labels = torch.randint(classes, (count,), generator=generator).numpy()
    return Table(torch.randn(count, classes, generator=generator)), Split.of(images, labels)


def _evaluate(
    model: nn.Module, split: Split, classes: int, batch_size: int, stop: StopFlag | None = None
) -> SplitMetrics:
    names = tuple(map(str, range(classes)))
    job = TrainJob(
        attachment=SimpleNamespace(model=model),  # type: ignore[arg-type]
        task=task_for("classification", Target("class", names), "toy"),
        dataset=Dataset("toy", Target("class", names), "made", "none", split, split, split),
        preprocess=PLAIN,
        config=TrainConfig(eval_batch_size=batch_size),
        device=CPU,
        directory=Path("unused"),
    )
    return evaluate(job, split, "fp32", stop=stop or StopFlag())


@pytest.mark.parametrize("batch_size", [1, 7, 50, 100])
@pytest.mark.parametrize("classes", [2, 4, 5, 10])
def test_accuracy_and_loss_equal_a_manual_computation(classes: int, batch_size: int) -> None:
    model, split = _toy(50, classes)
    result = _evaluate(model, split, classes, batch_size)
    labels = torch.from_numpy(split.targets)
    ranks = (model.logits_NC > model.logits_NC.gather(1, labels[:, None])).sum(1)
    assert result.values["top1"] == pytest.approx(100 * float((ranks == 0).float().mean()), abs=1e-4)
    assert result.values["top5"] == pytest.approx(100 * float((ranks < 5).float().mean()), abs=1e-4)
    assert result.loss == pytest.approx(float(nn.functional.cross_entropy(model.logits_NC, labels)), rel=1e-5)
    assert result.num_images == 50
    assert model.seen == list(range(50))


def test_evaluation_uses_eval_mode_and_restores_training_flags() -> None:
    model, split = _toy(10, 3)
    model.other = nn.Linear(1, 1).eval()
    before = [module.training for module in model.modules()]
    _evaluate(model, split, 3, 4)
    assert model.modes == [False] * 3
    assert [module.training for module in model.modules()] == before == [True, True, False]


def test_a_signal_stops_evaluation_and_training_flags_are_restored() -> None:
    model, split = _toy(10, 3)
    stop = StopFlag()
    stop.signal_name = "SIGTERM"
    with pytest.raises(Stopped, match="SIGTERM"):
        _evaluate(model, split, 3, 4, stop)
    assert model.training
    assert model.seen == []


def test_training_flags_are_restored_after_an_error() -> None:
    model, split = _toy(10, 3)
    model.logits_NC = torch.empty(0, 3)
    with suppress(IndexError):
        _evaluate(model, split, 3, 4)
    assert all(module.training for module in model.modules())
