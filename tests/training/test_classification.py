"""Classification: class weights, macro metrics and balanced sampling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, recall_score
from torch.nn import functional as F

import petune
from petune.base.errors import ConfigError, DataError, Stopped
from petune.data.batches import TrainBatches
from petune.data.dataset import Dataset, Split
from petune.data.preprocess import Preprocess
from petune.data.target import Target
from petune.training.batch_loss import check_task_options
from petune.training.config import TrainConfig
from petune.training.events import Event, StepDone
from petune.training.stop import StopFlag
from petune.training.task_registry import build_task, fitted_task, restore_task, task_for
from tests.program import call
from tests.training.conftest import toy_dataset
from tests.unbalanced import make_folder

Make = Callable[..., Any]
NAMES = ("cat", "dog", "eel")
COUNTS = (16, 3, 1)


def _split(counts: tuple[int, ...] = COUNTS) -> Split:
    labels = np.repeat(np.arange(len(counts)), counts)
    return Split.of(np.arange(len(labels) * 48, dtype=np.uint8).reshape(-1, 4, 4, 3), labels)


def _weights(text: str, counts: tuple[int, ...] = COUNTS) -> dict[str, float]:
    state = build_task(f"classification:{text}").fit(_split(counts), Target("class", NAMES))
    weights: dict[str, float] = state["class_weights"]
    return weights


@pytest.mark.parametrize(
    ("text", "relative"),
    [
        ("class_weights=inverse", (1 / 16, 1 / 3, 1.0)),
        ("class_weights=effective,beta=0", (1.0, 1.0, 1.0)),
        ("class_weights=effective,beta=0.5", (0.5 / (1 - 0.5**16), 0.5 / (1 - 0.5**3), 1.0)),
        ("class_weights={dog: 4, eel: 2.5}", (1.0, 4.0, 2.5)),
    ],
)
def test_class_weights_have_a_mean_of_one_over_the_training_images(text: str, relative: tuple[float, ...]) -> None:
    weights = _weights(text)
    assert sum(weights[name] * count for name, count in zip(NAMES, COUNTS, strict=True)) / 20 == pytest.approx(1)
    assert [weights[name] / weights["cat"] for name in NAMES] == pytest.approx([r / relative[0] for r in relative])


def test_without_class_weights_there_is_no_state() -> None:
    assert build_task("classification").fit(_split(), Target("class", NAMES)) == {}


def test_bad_class_weights_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'bird'"):
        _weights("class_weights={bird: 2}")
    with pytest.raises(ConfigError, match=r"'ca'.*cat"):
        _weights("class_weights={ca: 2}")
    with pytest.raises(ConfigError, match="weight 0"):
        _weights("class_weights={cat: 0, dog: 0, eel: 0}")
    with pytest.raises(DataError, match="eel has none"):
        _weights("class_weights=inverse", (16, 4, 0))
    for options in ("class_weights=invers", "class_weights={cat: -1}", "class_weights={cat: .nan}", "beta=1"):
        with pytest.raises(ConfigError, match=options.partition("=")[0]):
            build_task(f"classification:{options}")


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_classes_and_probabilities_have_the_same_weighted_loss(smoothing: float) -> None:
    """torch's mean would divide by the weights for classes, and by the images for probabilities."""
    task = task_for("classification", Target("class", NAMES), "toy")
    task.bind(task.target, {"class_weights": {"cat": 0.25, "dog": 2.0, "eel": 4.0}})
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 0])
    target = (1 - smoothing) * F.one_hot(labels, 3) + smoothing / 3
    expected = -(torch.tensor([0.25, 2.0, 4.0]) * target * logits.log_softmax(1)).sum(1)
    torch.testing.assert_close(task.loss(logits, labels, smoothing), expected)
    torch.testing.assert_close(task.loss(logits, target), expected)
    mixed = 0.3 * F.one_hot(labels, 3) + 0.7 * F.one_hot(labels.flip(0), 3)
    parts = 0.3 * task.loss(logits, labels) + 0.7 * task.loss(logits, labels.flip(0))
    torch.testing.assert_close(task.loss(logits, mixed), parts)


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_a_weighted_step_divides_once_by_the_images_of_the_batch(
    micro_batch: int | None, make_trainer: Make, toy: Make
) -> None:
    att = toy(0)
    att.model.body[2], att.model.body[3] = torch.nn.Identity(), torch.nn.Identity()
    att = type(att)(att.model)  # without the parameters of the BatchNorm
    task = "classification:class_weights={a: 9}"
    trainer = make_trainer(att, task=task, micro_batch_size=micro_batch, grad_clip=None)
    trainer.progress.micro_batch = micro_batch or 0
    weight_C = torch.tensor(list(trainer.job.task.state["class_weights"].values()))
    batch = next(trainer.batches.epoch(0))
    losses = F.cross_entropy(att.model(batch.x_BCHW), batch.y_B, reduction="none") * weight_C[batch.y_B]
    wanted = torch.autograd.grad(losses.mean(), list(att.model.head.parameters()))
    trainer.step(batch)
    for p, gradient in zip(att.model.head.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, gradient)


def test_the_weights_come_back_with_the_adapter() -> None:
    data = toy_dataset()
    task = fitted_task("classification:class_weights=inverse", data)
    recorded = {
        "name": "classification",
        "options": task.config.plain(),
        "state": task.state,
        "target": {"kind": "class", "names": list(data.target.names)},
    }
    logits, labels = torch.randn(3, 3), torch.arange(3)
    torch.testing.assert_close(restore_task({"task": recorded}).loss(logits, labels), task.loss(logits, labels))


def test_macro_metrics_are_means_over_the_classes_with_images() -> None:
    """Class d is predicted and has no images: torchmetrics' macro average would count it as 0."""
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
    predicted = torch.tensor([0, 0, 0, 3, 1, 0, 2, 2])
    meter = task_for("classification", Target("class", ("a", "b", "c", "d", "e", "f")), "toy").new_meter()
    for rows in (slice(0, 1), slice(1, 8)):
        meter.update(F.one_hot(predicted, 6)[rows].float(), labels[rows])
    values = meter.compute()
    assert values["top1"] == pytest.approx(75)
    for name, score in (("macro_accuracy", recall_score), ("macro_f1", f1_score)):
        expected = score(labels, predicted, average=None, labels=[0, 1, 2], zero_division=0).mean()
        assert values[name] == pytest.approx(100 * expected)


def test_equal_logits_give_the_same_class_in_metric_values_of_images_and_prediction() -> None:
    names = tuple("abcdefghijklmnopqrst")
    task = task_for("classification", Target("class", names), "toy")
    for count in (1, 3, 20):
        logits = torch.zeros(20, 20)
        logits[:, :count] = 1.0
        labels = torch.arange(20)
        meter = task.new_meter()
        meter.update(logits, labels)
        assert float(task.image_values(logits, labels)["top1"].mean()) == pytest.approx(meter.compute()["top1"])
        assert {next(iter(row)) for row in task.predict(logits)} == {"a"}


def _batches(split: Split, seed: int = 0, **options: Any) -> TrainBatches:
    preprocess = Preprocess(4, *split.channel_statistics())
    return TrainBatches(split, preprocess, "shift", 6, seed, torch.device("cpu"), balanced=True, **options)


def _drawn(batches: TrainBatches, epoch: int) -> np.ndarray[Any, Any]:
    return np.concatenate([batch.positions for batch in batches.epoch(epoch)])


def test_a_balanced_epoch_draws_every_class_equally_often() -> None:
    split = _split((22, 3, 2))
    epochs = [_drawn(_batches(split), epoch) for epoch in range(3)]
    for drawn in epochs:
        assert np.ptp(np.bincount(split.targets[drawn], minlength=3)) <= 1
        per_image = np.bincount(drawn, minlength=len(split))
        for label in range(3):
            assert np.ptp(per_image[split.targets == label]) <= 1
    assert len({drawn.tobytes() for drawn in epochs}) == 3
    assert len(set(np.concatenate(epochs).tolist())) > 22  # what one epoch leaves out, another one shows


def test_a_balanced_epoch_depends_on_seed_and_epoch_alone() -> None:
    split = _split((22, 3, 2))
    whole = list(_batches(split, 4).epoch(2))
    rest = list(_batches(split, 4).epoch(2, start=2))
    for one, other in zip(whole[2:], rest, strict=True):
        assert torch.equal(one.x_BCHW, other.x_BCHW)
    assert not np.array_equal(_drawn(_batches(split, 5), 2), _drawn(_batches(split, 4), 2))
    same = [batch.x_BCHW[batch.positions == 26] for batch in whole]  # one image, drawn several times
    assert len({image.numpy().tobytes() for image in torch.cat(same)}) > 1


def test_balanced_sampling_is_for_classes() -> None:
    task = task_for("classification", Target("class", NAMES), "toy")
    task.target_kind = "number"  # type: ignore[misc]
    with pytest.raises(ConfigError, match="sampling=balanced"):
        check_task_options(task, TrainConfig(sampling="balanced"), _split(), 1)


def test_a_balanced_training_resumes_to_the_bit(make_trainer: Make, toy: Make, tmp_path: Path) -> None:
    data: Dataset = toy_dataset()
    few = np.flatnonzero((data.train.targets == 0) | (np.arange(len(data.train)) % 4 == 0))
    data = replace(data, train=data.train.take(few))
    whole = make_trainer(toy(0), dataset=data, directory=tmp_path / "whole", sampling="balanced")
    whole.fit()
    stop = StopFlag()

    def interrupt(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 3:
            stop.signal_name = "SIGTERM"

    options = {"dataset": data, "directory": tmp_path / "parts", "sampling": "balanced"}
    with pytest.raises(Stopped):
        make_trainer(toy(0), **options, stop=stop, on_event=interrupt).fit()
    resumed = make_trainer(toy(1), **options)
    resumed.fit()
    for key, p in whole.params.items():
        assert torch.equal(p, resumed.params[key]), key


OPTIONS: dict[str, Any] = {
    "method": "linear", "backbone": "vit_nano", "device": "cpu", "seed": 1,
    "train": {"epochs": 4, "batch_size": 32, "lr": 3e-3, "precision": "fp32", "augment": "none"},
}  # fmt: skip


def _macro_f1(folder: Path, output: Path, **options: Any) -> float:
    return petune.run(**{**OPTIONS, **options}, dataset=str(folder), output=output).metrics["macro_f1"]


@pytest.mark.exhaustive
def test_class_weights_raise_macro_f1_of_an_unbalanced_folder_of_real_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_folder(tmp_path / "animals")
    monkeypatch.chdir(tmp_path)
    plain = _macro_f1(folder, tmp_path / "plain")
    weighted = _macro_f1(folder, tmp_path / "weighted", task="classification:class_weights=inverse")
    assert weighted > plain + 3
    done = call("eval", "weighted", "--device", "cpu", capture=capsys)
    assert done.code == 0, done.err
    assert {"recall", "precision", "macro-F1"} <= set(done.out.replace("|", " ").split())
    assert f"{weighted:.2f} %" in done.out
    boat = ("--backbone", "vit_nano", "--dataset", "animals", "--task", "classification:class_weights={boat: 2}")
    wrong = call("run", *boat, capture=capsys)
    assert (wrong.code, "'boat'" in wrong.err) == (2, True), wrong.err


@pytest.mark.exhaustive
def test_balanced_sampling_raises_macro_f1_of_an_unbalanced_folder_of_real_images(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "animals")
    balanced = _macro_f1(folder, tmp_path / "balanced", train={**OPTIONS["train"], "sampling": "balanced"})
    assert balanced > _macro_f1(folder, tmp_path / "plain") + 3
