"""The loop: losses of a plain torch loop, only finite numbers on disk, the kept epoch in the model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from petune.base.errors import CheckpointError, ConfigError, Diverged
from petune.base.metric import SplitMetrics
from petune.training.events import EpochEnded, Event, StepDone
from petune.training.randomness import step_seed

Make = Callable[..., Any]


def _lines(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def _plain_losses(att: Any, batches: Any, steps: int, lr: float, smoothing: float) -> list[float]:
    """Return the losses of a dozen lines of plain torch on the same batches."""
    decayed = [p for p in att.model.parameters() if p.ndim > 1]
    plain = [p for p in att.model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)
    losses, step = [], 0
    att.model.train()
    while step < steps:
        for batch in batches.epoch(step // len(batches)):
            torch.manual_seed(step_seed(3, step))
            for group in optimizer.param_groups:
                group["lr"] = lr / 2 * (1 + math.cos(math.pi * step / steps))
            loss = F.cross_entropy(att.model(batch.x_BCHW), batch.y_B, label_smoothing=smoothing)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(att.model.parameters(), 1.0)
            optimizer.step()
            losses.append(float(loss.detach()))
            step += 1
    return losses


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses_equal_those_of_a_plain_loop(smoothing: float, tmp_path: Path, make_trainer: Make, toy: Make) -> None:
    trainer = make_trainer(toy(0), epochs=3, optimizer="sgd", log_every=1, label_smoothing=smoothing, keep="last")
    trainer.fit()
    logged = [line["loss"] for line in _lines(tmp_path) if "step" in line]
    expected = _plain_losses(toy(0), trainer.batches, 15, 0.05, smoothing)
    assert logged == pytest.approx(expected, rel=1e-6)
    assert sum(logged[-5:]) < sum(logged[:5])


def test_every_step_and_epoch_is_one_event_and_logged_once(tmp_path: Path, make_trainer: Make, toy: Make) -> None:
    events: list[Event] = []
    att = toy(0)
    fitted = make_trainer(att, on_event=events.append).fit()
    steps = [event for event in events if isinstance(event, StepDone)]
    assert [event.step for event in steps] == list(range(1, 11))
    assert {event.total_steps for event in steps} == {10}
    assert [event.epoch for event in steps] == [0] * 5 + [1] * 5
    assert [event.metrics for event in events if isinstance(event, EpochEnded)] == fitted.epochs
    lines = _lines(tmp_path)
    assert [line.get("step") for line in lines] == [2, 4, None, 6, 8, 10, None]
    assert [line for line in lines if "step" not in line] == fitted.epochs
    assert steps[4].loss == pytest.approx(fitted.epochs[0]["train_loss"])
    assert att.checks == 2  # after the first backward and under way
    assert fitted.images_per_s > 0
    assert fitted.step_time_s * 10 <= fitted.time_s


def test_the_best_epoch_is_kept(make_trainer: Make, toy: Make) -> None:
    trainer = make_trainer(toy(0), epochs=5, lr=0.3)
    fitted = trainer.fit()
    tops = [row["val_top1"] for row in fitted.epochs]
    assert fitted.val.values["top1"] == max(tops)
    assert fitted.epoch == max(range(5), key=lambda i: (tops[i], -fitted.epochs[i]["val_loss"], i)) + 1
    assert trainer.evaluate("val").values == fitted.val.values
    assert trainer.evaluate("val").loss == fitted.epochs[fitted.epoch - 1]["val_loss"]


@pytest.mark.parametrize(
    ("losses", "kept"), [((0.5, 0.4, 0.3), 3), ((0.5, 0.3, 0.4), 2), ((0.5, 0.3, 0.3), 3), ((0.3, 0.4, 0.5), 1)]
)
def test_of_tied_epochs_the_lowest_loss_and_then_the_latest_is_kept(
    losses: tuple[float, ...], kept: int, make_trainer: Make, toy: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(toy(0), epochs=4)
    results = iter([*(SplitMetrics({"top1": 50.0}, loss, 9) for loss in losses), SplitMetrics({"top1": 40.0}, 0.1, 9)])
    monkeypatch.setattr(trainer, "evaluate", lambda split: next(results))
    assert trainer.fit().epoch == kept


def test_the_last_epoch_is_kept_on_request(make_trainer: Make, toy: Make) -> None:
    trainer = make_trainer(toy(0), epochs=4, lr=0.3, keep="last")
    fitted = trainer.fit()
    assert fitted.epoch == 4
    assert trainer.evaluate("val").loss == fitted.epochs[-1]["val_loss"]


def test_val_every(tmp_path: Path, make_trainer: Make, toy: Make) -> None:
    fitted = make_trainer(toy(0), epochs=5, val_every=2).fit()
    assert [line["epoch"] for line in _lines(tmp_path) if "val_top1" in line] == [2, 4, 5]
    assert [line["epoch"] for line in _lines(tmp_path) if "train_loss" in line] == [1, 2, 3, 4, 5]
    assert fitted.epoch in (2, 4, 5)


class Poisoned(nn.Module):
    """Returns the output of `inside`, times NaN in one training step or in every evaluation."""

    def __init__(self, inside: nn.Module, at: int | None = None, in_eval: bool = False, factor: float = math.nan):
        super().__init__()
        self.inside, self.at, self.in_eval, self.factor, self.calls = inside, at, in_eval, factor, 0

    def forward(self, x_BCHW: Tensor) -> Tensor:
        self.calls += self.training
        bad = self.calls == self.at if self.training else self.in_eval
        logits_BC: Tensor = self.inside(x_BCHW)
        return logits_BC * self.factor if bad else logits_BC


def _all_finite(directory: Path) -> None:
    for file in (directory / "checkpoints").glob("*/*.safetensors"):
        assert all(bool(torch.isfinite(t).all()) for t in load_file(file).values()), file
    for line in _lines(directory):
        assert all(math.isfinite(value) for value in line.values())


@pytest.mark.parametrize("factor", [math.nan, math.inf, 1e38])
def test_a_diverged_step_is_not_taken(factor: float, tmp_path: Path, make_trainer: Make, toy: Make) -> None:
    att = toy(0)
    att.model = Poisoned(att.model, at=7, factor=factor)
    trainer = make_trainer(att, epochs=3, log_every=1)
    with pytest.raises(Diverged) as caught:
        trainer.fit()
    positions = list(trainer.batches.epoch(1))[1].positions.tolist()
    for part in (
        "at step 6:",
        "lr 0.0",
        str(positions),
        "last good checkpoint is of step 5",
        "lower learning rate",
    ):
        assert part in str(caught.value)
    assert [line["step"] for line in _lines(tmp_path) if "step" in line] == [1, 2, 3, 4, 5, 6]
    assert all(bool(torch.isfinite(p).all()) for p in att.model.parameters())
    _all_finite(tmp_path)


def test_divergence_in_the_first_step(make_trainer: Make, toy: Make) -> None:
    att = toy(0)
    att.model = Poisoned(att.model, at=1)
    with pytest.raises(Diverged, match="there is no checkpoint yet"):
        make_trainer(att).fit()


def test_divergence_in_validation(tmp_path: Path, make_trainer: Make, toy: Make) -> None:
    att = toy(0)
    att.model = Poisoned(att.model, in_eval=True)
    with pytest.raises(Diverged, match="the loss on val is nan"):
        make_trainer(att, log_every=1).fit()
    assert all(math.isfinite(value) for line in _lines(tmp_path) for value in line.values())
    assert not (tmp_path / "checkpoints").exists()


def test_a_far_too_high_learning_rate_is_an_error(tmp_path: Path, make_trainer: Make, toy: Make) -> None:
    with pytest.raises(Diverged):
        make_trainer(toy(0), epochs=50, lr=9e3, optimizer="sgd", grad_clip=None, weight_decay=5.0).fit()
    _all_finite(tmp_path)


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_mixing_an_odd_batch_is_an_error(name: str, make_trainer: Make, toy: Make) -> None:
    with pytest.raises(ConfigError, match="need an even batch size, but it is 5"):
        make_trainer(toy(0), batch_size=5, **{name: 1.0})


def test_mixing_does_not_touch_numpys_generator(make_trainer: Make, toy: Make) -> None:
    import numpy as np

    np.random.seed(0)
    expected = np.random.RandomState(0).random()
    make_trainer(toy(0), mixup=0.5, cutmix=0.5, epochs=1).fit()
    assert np.random.random() == expected


def test_mixed_targets_are_probabilities_with_smoothing(make_trainer: Make, toy: Make) -> None:
    trainer = make_trainer(toy(0), mixup=0.8, label_smoothing=0.1)
    batch = next(trainer.batches.epoch(0))
    before = batch.x_BCHW.clone()
    x, target = trainer.mixer(batch, 0)
    assert trainer.mixer.label_smoothing == 0
    torch.testing.assert_close(target.sum(1), torch.ones(len(x)))
    assert float(target.min()) == pytest.approx(0.1 / 3, abs=1e-6)
    assert not torch.equal(x, before)


def test_a_checkpoint_of_another_model_is_an_error(make_trainer: Make, toy: Make) -> None:
    make_trainer(toy(0)).fit()
    other = toy(0)
    other.model.head = nn.Linear(12, 5)
    other.__post_init__()
    with pytest.raises(CheckpointError, match="another model, method or dataset"):
        make_trainer(other).fit()


def test_a_checkpoint_with_other_parameter_groups_is_an_error(make_trainer: Make, toy: Make) -> None:
    """The states of an optimizer belong to parameters by their place in the groups."""
    make_trainer(toy(0)).fit()
    with pytest.raises(CheckpointError, match="weight decay to other parameters"):
        make_trainer(toy(0), decay_vectors=True).fit()
