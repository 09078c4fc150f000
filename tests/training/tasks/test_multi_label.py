"""Multi-label classification: losses equal timm's and share a learning rate, metrics count classes with images."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import timm.loss
import torch
from sklearn import metrics as sklearn_metrics

import petune
from petune.base.errors import ConfigError, DataError
from petune.data.dataset import Split
from petune.data.target import Target
from petune.training.batch_loss import check_task_options
from petune.training.config import TrainConfig
from petune.training.task_registry import build_task
from petune.training.tasks.multi_label_loss import gradient_scale
from petune.training.tasks.thresholds import choose_thresholds
from tests.sampling import sampled

LOSSES = ("bce", "asl", "poly", "db", "zlpr", "twoway")


def split(targets: Any) -> Split:
    targets = np.asarray(targets, np.uint8)
    return Split.of(np.zeros((len(targets), 1, 1, 3), np.uint8), targets)


def some_targets(num_images: int, num_classes: int, share: float = 0.2, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(num_images, num_classes, generator=generator) < share).to(torch.uint8)


def task_on(targets: Any, **options: Any) -> Any:
    task, train = build_task("multi_label"), split(targets)
    task = type(task)(**options)
    target = Target("multi_hot", tuple(f"c{c}" for c in range(train.targets.shape[1])))
    task.bind(target, json.loads(json.dumps(task.fit(train, target))))
    return task


@pytest.mark.parametrize(
    ("loss", "smoothing"), [*((loss, 0.0) for loss in LOSSES), *((loss, 0.1) for loss in ("bce", "asl", "poly", "db"))]
)
def test_the_mean_over_images_is_timms_loss(loss: str, smoothing: float) -> None:
    targets, logits = some_targets(40, 7), torch.randn(40, 7)
    task = task_on(targets, loss=loss)
    counts = {"class_counts": targets.sum(0), "num_samples": 40} if loss == "db" else {}
    options = {"asl_reduction": "mean"} if loss == "asl" else {}
    criterion = timm.loss.create_classification_loss(loss, multi_label=True, smoothing=smoothing, **counts, **options)
    found = task.loss(logits, targets, smoothing)
    assert found.shape == (40,)
    torch.testing.assert_close(found.mean(), criterion(logits, targets.float()) * task.state.get("scale", 1.0))


@pytest.mark.parametrize("options", [*(f"loss={loss}" for loss in LOSSES), "pos_weight=balanced,threshold=per_class"])
def test_every_loss_meets_the_contract(options: str) -> None:
    assert petune.check_task(f"multi_label:{options}")


@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "twoway"])
def test_the_loss_of_an_image_does_not_depend_on_the_others(loss: str) -> None:
    targets, logits = some_targets(8, 5), torch.randn(8, 5)
    task = task_on(targets, loss=loss)
    alone = torch.cat([task.loss(logits[[i]], targets[[i]]) for i in range(8)])
    torch.testing.assert_close(task.loss(logits, targets), alone)


@pytest.mark.parametrize("num_classes", [1, 5, 80])
@pytest.mark.parametrize("loss", [*LOSSES, "weighted"])
def test_losses_have_the_same_gradient_at_the_start(loss: str, num_classes: int) -> None:
    """Unscaled, asl would be the number of classes times bce, and twoway 8 times."""
    targets = some_targets(400, num_classes, share=min(0.4, 2 / num_classes))
    options: dict[str, Any] = {"loss": "bce", "pos_weight": "balanced"} if loss == "weighted" else {"loss": loss}
    task = task_on(targets, **options)
    logits = torch.zeros(targets.shape, requires_grad=True)
    task.loss(logits, targets).sum().backward()
    assert float(logits.grad.abs().sum()) / 400 == pytest.approx(0.5, rel=0.1)


def test_the_scale_of_a_sum_over_classes_is_undone() -> None:
    targets = some_targets(100, 10)
    summed = gradient_scale(
        lambda z, y: torch.nn.functional.binary_cross_entropy_with_logits(z, y.float(), reduction="none").sum(1),
        targets,
    )
    assert summed == pytest.approx(1 / 10)


def test_twoway_needs_the_whole_batch() -> None:
    task, train = task_on(some_targets(8, 3), loss="twoway"), split(some_targets(8, 3))
    assert not task_on(some_targets(8, 3)).needs_whole_batch
    for config, processes in (({"micro_batch_size": 2}, 1), ({}, 2)):
        with pytest.raises(ConfigError, match="whole batch"):
            check_task_options(task, TrainConfig.build(config), train, processes)
    check_task_options(task, TrainConfig(), train, 1)


@pytest.mark.parametrize("loss", ["zlpr", "twoway"])
def test_losses_that_round_their_targets_refuse_soft_ones(loss: str) -> None:
    task, train = task_on(some_targets(8, 3), loss=loss), split(some_targets(8, 3))
    for config in ({"mixup": 0.4}, {"cutmix": 1.0}):
        with pytest.raises(ConfigError, match=loss):
            check_task_options(task, TrainConfig.build(config), train, 1)
    with pytest.raises(ConfigError, match=f"label_smoothing.*{loss}"):
        check_task_options(task, TrainConfig(label_smoothing=0.1), train, 1)


def test_mixed_labels_are_between_0_and_1_and_smoothed_towards_a_half() -> None:
    targets = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 1, 0, 1]], dtype=torch.uint8)
    np.random.seed(0)
    images, mixed = task_on(targets).mix(1.0, 0.0, 0.2)(
        torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)]), targets
    )
    share = 1 - float(images[0, 0, 0, 0])
    soft = targets.float() * 0.8 + 0.1
    torch.testing.assert_close(mixed, share * soft + (1 - share) * soft.flip(0))
    assert task_on(targets).loss(torch.zeros(2, 5), mixed).shape == (2,)


def test_positive_weights() -> None:
    targets = [[1, 1, 0], [0, 1, 0], [0, 1, 0], [0, 1, 1]]
    assert task_on(targets, pos_weight="balanced").state["pos_weight"] == [3.0, 1.0, 3.0]  # one in every image keeps 1
    assert task_on(targets, pos_weight={"c0": 5}).state["pos_weight"] == [5.0, 1.0, 1.0]
    assert task_on(targets, pos_weight=2).state["pos_weight"] == [2.0] * 3
    task = task_on(targets, pos_weight={"c0": 5})
    logits, y = torch.zeros(4, 3), torch.tensor(targets)
    weights = torch.tensor([[5.0, 1, 1]])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, y.float(), pos_weight=weights[0])
    torch.testing.assert_close(task.loss(logits, y).mean(), expected * task.state["scale"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "zlpr", "pos_weight": "balanced"}, "pos_weight"),
        ({"loss": "bce", "gamma_neg": 2}, "gamma_neg"),
        ({"loss": "focal"}, "loss"),
        ({"pos_weight": 0}, "pos_weight"),
        ({"pos_weight": "inverse"}, "pos_weight"),
        ({"threshold": 1.5}, "threshold"),
        ({"pos_weight": {"c9": 2}}, "no such class: c9"),
        ({"pos_weight": "balanced"}, "no training image has c2"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        task_on([[1, 0, 0], [0, 1, 0]], **options)


def test_other_shapes_are_refused_instead_of_broadcast() -> None:
    task = task_on(some_targets(4, 3))
    for targets in (torch.ones(4, 1), torch.ones(4), torch.ones(1, 3)):
        with pytest.raises(DataError, match="shape"):
            task.loss(torch.zeros(4, 3), targets)
        with pytest.raises(DataError, match="shape"):
            task.new_meter().update(torch.zeros(4, 3), targets)


def test_metrics_equal_scikit_learns_over_the_classes_with_images() -> None:
    targets, logits = some_targets(60, 4), torch.randn(60, 4)
    targets[:, 2] = 0
    task = task_on(targets, threshold=0.4)
    meter = task.new_meter()
    meter.update(logits, targets)
    values = meter.compute()
    present, predicted = [0, 1, 3], (logits.sigmoid() >= 0.4).numpy()
    precisions = [sklearn_metrics.average_precision_score(targets[:, c], logits[:, c]) for c in present]
    scores = [sklearn_metrics.f1_score(targets[:, c], predicted[:, c]) for c in present]
    assert values["map"] == pytest.approx(100 * np.mean(precisions))
    assert values["macro_f1"] == pytest.approx(100 * np.mean(scores), rel=1e-5)
    assert values["micro_f1"] == pytest.approx(
        100 * sklearn_metrics.f1_score(targets, predicted, average="micro"), rel=1e-5
    )
    assert values["classes_counted"] == 3
    assert np.isnan(values["ap/c2"])
    assert values["ap/c3"] == pytest.approx(100 * precisions[2], rel=1e-5)
    assert {metric.name for metric in task.metrics} == values.keys()
    assert [metric.name for metric in task.metrics if metric.per_class] == ["ap/c0", "ap/c1", "ap/c2", "ap/c3"]


@pytest.mark.parametrize("batch", [1, 7, 60])
def test_metrics_do_not_depend_on_the_batches(batch: int) -> None:
    """Batches of logits that happen to be in 0 to 1 are still logits."""
    targets, logits = some_targets(60, 3), torch.rand(60, 3) * 3 - 1
    task = task_on(targets)
    meters = [task.new_meter(), task.new_meter()]
    meters[0].update(logits, targets)
    for rows in torch.arange(60).split(batch):
        meters[1].update(logits[rows], targets[rows])
    assert meters[0].compute() == meters[1].compute()


def test_logits_that_saturate_the_sigmoid_are_still_ranked() -> None:
    task = task_on([[1], [0], [0]])
    meter = task.new_meter()
    meter.update(torch.tensor([[30.0], [25.0], [20.0]]), torch.tensor([[1], [0], [0]]))
    assert meter.compute()["map"] == 100


def brute_force(probabilities: np.ndarray, targets: np.ndarray) -> float:
    cuts = np.unique(np.concatenate([[0], probabilities.ravel(), [1]]))
    pairs = list(zip(probabilities.T, targets.T, strict=True))
    return float(max(np.mean([sklearn_metrics.f1_score(y, p >= t) for p, y in pairs]) for t in cuts))


@pytest.mark.parametrize("seed", sampled(range(5), (0).__eq__))
def test_chosen_thresholds_have_the_best_f1(seed: int) -> None:
    targets = some_targets(30, 3, seed=seed)
    targets[0] = 1
    probabilities = torch.rand(30, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def f1(thresholds: list[float]) -> list[float]:
        predicted = probabilities.numpy() >= thresholds
        return [sklearn_metrics.f1_score(targets[:, c], predicted[:, c]) for c in range(3)]

    common = choose_thresholds(probabilities, targets, per_class=False)
    assert len(set(common)) == 1
    assert np.mean(f1(common)) == pytest.approx(brute_force(probabilities.numpy(), targets.numpy()))
    for c, score in enumerate(f1(choose_thresholds(probabilities, targets, per_class=True))):
        assert score == pytest.approx(brute_force(probabilities[:, [c]].numpy(), targets[:, [c]].numpy()))


def test_thresholds_of_classes_without_positives_and_of_perfect_ones() -> None:
    probabilities = torch.tensor([[0.9, 0.2], [0.3, 0.1]], dtype=torch.float64)
    targets = torch.tensor([[1, 0], [0, 0]])
    assert choose_thresholds(probabilities, targets, per_class=True) == pytest.approx([0.6, 0.6])
    assert choose_thresholds(probabilities, torch.zeros(2, 2), per_class=True) == [0.5, 0.5]


def test_thresholds_are_chosen_once_and_used_by_metrics_and_predictions() -> None:
    targets = torch.tensor([[1, 0], [1, 0], [0, 1]], dtype=torch.uint8)
    logits = torch.tensor([[-2.0, -5.0], [-2.5, -6.0], [-4.0, -3.0]])
    task = task_on(targets)
    assert [list(labels) for labels in task.predict(logits)] == [[], [], []]  # 0.5 before there is a choice
    meter = task.new_meter()
    meter.update(logits, targets)
    assert meter.compute()["macro_f1"] == 100
    state = json.loads(json.dumps(task.calibrate(meter)))
    task.bind(task.target, {**task.state, **state})
    assert [list(labels) for labels in task.predict(logits)] == [["c0"], ["c0"], ["c1"]]
    swapped = task.new_meter()
    swapped.update(logits.flip(0), targets)  # other images: the thresholds stay
    assert swapped.compute()["macro_f1"] < 100
    assert task.calibrate(swapped) == {}
    assert task_on(targets).calibrate(None) == {"thresholds": [0.5, 0.5]}
    assert task_on(targets, threshold=0.3).state["thresholds"] == [0.3, 0.3]


def test_predictions_are_sorted_by_probability() -> None:
    task = task_on(some_targets(4, 3))
    (prediction,) = task.predict(torch.tensor([[0.5, -3.0, 2.0]]))
    assert list(prediction) == ["c2", "c0"]
    assert prediction["c2"] == pytest.approx(torch.tensor(2.0).sigmoid().item())
