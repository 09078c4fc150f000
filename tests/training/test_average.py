"""The average of what trains (`train.ema`), early stopping (`train.patience`), and the mode of `train.choose`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import petune
from petune.base.errors import ConfigError, Stopped
from petune.base.metric import SplitMetrics
from petune.data.target import Target
from petune.training.average import Average
from petune.training.config import TrainConfig
from petune.training.events import Event, Note, StepDone
from petune.training.stop import StopFlag
from petune.training.task import choose_metrics
from petune.training.task_registry import task_for

Make = Callable[..., Any]
STEPS = 10  # two epochs of five batches


def test_the_average_is_that_of_timm_where_its_model_is_told_the_step() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    params = dict(layer.named_parameters())
    average, timms = Average(params, 0.9), ModelEmaV3(layer, decay=0.9, use_warmup=True)
    for step in range(1, 60):
        with torch.no_grad():
            for p in params.values():
                p.add_(torch.randn_like(p))
        average.update(step)
        timms.update(layer, step=step)
        for key, value in timms.module.state_dict().items():
            torch.testing.assert_close(average.values[key], value)


def test_small_steps_in_bfloat16_move_the_average() -> None:
    params = {"w": nn.Parameter(torch.ones(4, dtype=torch.bfloat16))}
    average = Average(params, 0.999)
    average.update(1)
    params["w"].data += 1
    for step in range(2, 30_000):
        average.update(step)
    assert average.values["w"].dtype == torch.float32
    torch.testing.assert_close(average.values["w"], torch.full((4,), 2.0))


def test_the_model_gets_its_own_values_back_also_after_an_error() -> None:
    params = {"w": nn.Parameter(torch.ones(2))}
    average = Average(params, 0.5)
    average.update(1)
    params["w"].data += 4

    def fail() -> None:
        with average.applied():
            assert params["w"].tolist() == [1, 1]
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert params["w"].tolist() == [5, 5]


def _tensors(trainer: Any) -> dict[str, Tensor]:
    return {key: tensor.detach().clone() for key, tensor in trainer.state.tensors().items()}


def test_evaluation_and_the_kept_epoch_use_the_average(make_trainer: Make, toy: Make, tmp_path: Path) -> None:
    trainer = make_trainer(toy(0), directory=tmp_path / "averaged", ema=0.8, schedule="constant")
    evaluated: list[dict[str, Tensor]] = []
    evaluate = trainer.evaluate

    def watched(*args: Any, **kwargs: Any) -> SplitMetrics:
        evaluated.append(_tensors(trainer))
        metrics: SplitMetrics = evaluate(*args, **kwargs)
        return metrics

    trainer.evaluate = watched
    trajectory: list[dict[str, Tensor]] = []
    trainer.on_event = lambda event: trajectory.append(_tensors(trainer)) if isinstance(event, StepDone) else None
    fitted = trainer.fit()
    expected = {key: trajectory[0][key] for key in trainer.params}
    for step, tensors in enumerate(trajectory[1 : STEPS // 2], 2):
        decay = min(0.8, 1 - step ** (-2 / 3))
        expected = {key: decay * value + (1 - decay) * tensors[key] for key, value in expected.items()}
    for key, value in expected.items():
        torch.testing.assert_close(evaluated[0][key], value)
    buffers = [key for key in trajectory[0] if key.startswith("buffer:")]
    assert buffers
    assert all(torch.equal(evaluated[0][key], trajectory[STEPS // 2 - 1][key]) for key in buffers)
    kept = evaluated[fitted.epoch - 1]
    assert all(torch.equal(tensor, kept[key]) for key, tensor in _tensors(trainer).items())


def test_the_last_epoch_is_kept_as_an_average(make_trainer: Make, toy: Make) -> None:
    trainer = make_trainer(toy(0), ema=0.8, keep="last")
    trainer.fit()
    for key, p in trainer.params.items():
        assert torch.equal(p, trainer.state.average.values[key])


@pytest.mark.parametrize("step", [1, 4, 5, 7])
def test_an_averaged_training_resumes_to_the_bit(step: int, make_trainer: Make, toy: Make, tmp_path: Path) -> None:
    whole = make_trainer(toy(0), directory=tmp_path / "whole", ema=0.9)
    whole.fit()
    stop = StopFlag()

    def interrupt(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == step:
            stop.signal_name = "SIGTERM"

    with pytest.raises(Stopped):
        make_trainer(toy(0), directory=tmp_path / "parts", ema=0.9, stop=stop, on_event=interrupt).fit()
    resumed = make_trainer(toy(1), directory=tmp_path / "parts", ema=0.9)
    resumed.fit()
    for key, tensor in _tensors(whole).items():
        assert torch.equal(tensor, _tensors(resumed)[key]), key
    assert whole.progress.epochs == resumed.progress.epochs


def _watched(make: Make, toy: Make, directory: Path, losses: list[float], **train: Any) -> tuple[Any, list[str]]:
    """Train with given losses on val; return the trainer and the notes."""
    notes: list[str] = []
    trainer = make(
        toy(0), directory=directory, choose="loss", epochs=8, **train,
        on_event=lambda event: notes.append(event.text) if isinstance(event, Note) else None,
    )  # fmt: skip
    trainer.evaluate = lambda split: SplitMetrics({"top1": 0.0}, losses[trainer.progress.epoch], 9)
    return trainer, notes


def test_training_stops_when_patience_is_over(make_trainer: Make, toy: Make, tmp_path: Path) -> None:
    losses = [5.0, 3.0, 4.0, 2.5, 2.6, 2.7, 2.8, 1.0]
    trainer, notes = _watched(make_trainer, toy, tmp_path, losses, patience=2)
    fitted = trainer.fit()
    assert (fitted.epoch, len(fitted.epochs), fitted.stopped_early) == (4, 6, True)
    assert "after epoch 6 of 8" in notes[-1]
    again, _ = _watched(make_trainer, toy, tmp_path, losses, patience=2)
    before = _tensors(trainer)
    fitted = again.fit()  # nothing is left to train
    assert (fitted.epoch, len(fitted.epochs), fitted.stopped_early) == (4, 6, True)
    assert all(torch.equal(tensor, before[key]) for key, tensor in _tensors(again).items())


def test_patience_ends_with_an_evaluation(make_trainer: Make, toy: Make, tmp_path: Path) -> None:
    trainer, _ = _watched(make_trainer, toy, tmp_path, [9, 3.0, 9, 4.0, 9, 5.0, 9, 1.0], patience=3, val_every=2)
    fitted = trainer.fit()
    assert (fitted.epoch, len(fitted.epochs)) == (2, 6)
    with pytest.raises(ConfigError, match="patience must be at least 3"):
        TrainConfig.build({"patience": 2, "val_every": 3})


def test_a_pretraining_has_no_patience() -> None:
    with pytest.raises(ConfigError, match="patience"):
        petune.PretrainConfig.build({"train": {"patience": 2}})


def test_an_early_stop_is_recorded(tmp_path: Path) -> None:
    result = petune.run(
        method="linear", backbone="vit_nano", weights="none", backbone_options={"depth": 2, "embed_dim": 24},
        dataset="digits", shots=5, device="cpu", output=tmp_path / "run",
        train={"epochs": 30, "lr": 1e-9, "patience": 2, "choose": "loss:max", "precision": "fp32", "ema": 0.5},
    )  # fmt: skip
    assert result.stopped_early
    assert result.epochs - result.epoch == 2
    assert any(value.endswith(f"of {result.epochs}, stopped early)") for _, value in result.facts())
    assert result.metric_info[0].higher_is_better
    assert petune.RunResult.read(tmp_path / "run") == result


@pytest.mark.parametrize(
    ("choose", "higher"), [("loss", False), ("loss:max", True), ("top1:min", False), ("top1", True)]
)
def test_choose_with_a_mode(choose: str, higher: bool) -> None:
    task = task_for("classification", Target("class", ("a", "b")), "toy")
    chosen = choose_metrics(task, TrainConfig.build({"choose": choose}).choose)
    assert (chosen[0].name, chosen[0].higher_is_better) == (choose.partition(":")[0], higher)
    assert [metric.name for metric in chosen[1:]] == [m.name for m in task.metrics if m.name != chosen[0].name]


def test_choose_as_a_mapping() -> None:
    assert TrainConfig.build({"choose": {"metric": "macro_f1", "mode": "max"}}).choose == "macro_f1:max"
    assert TrainConfig.build({"choose": {"metric": "loss"}}).choose == "loss"
    for wrong in ("loss:low", {"metric": "loss", "mode": "low"}, {"metrics": "loss"}):
        with pytest.raises(ConfigError, match="choose"):
            TrainConfig.build({"choose": wrong})
