"""Regression: standardized inside, metrics in the targets' units, no silent broadcast."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics

import petune
from petune.base.errors import ConfigError, DataError
from petune.data.dataset import Split
from petune.data.target import Target
from petune.training.batch_loss import check_task_options
from petune.training.config import TrainConfig
from petune.training.task_registry import build_task
from petune.training.tasks.regression_meter import RegressionMeter, r2_score


def split(targets: Any) -> Split:
    targets = np.asarray(targets, np.float64)
    return Split.of(np.zeros((len(targets), 1, 1, 3), np.uint8), targets)


def task_on(targets: Any, **options: Any) -> Any:
    train = split(targets)
    task = type(build_task("regression"))(**options)
    task.name = "regression"
    target = Target("number", ("age", "height")[: train.targets.shape[1]])
    task.bind(target, json.loads(json.dumps(task.fit(train, target))))
    return task


def some_numbers(count: int = 50, offset: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 2, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 20.0]) + offset


def test_targets_are_standardized_inside() -> None:
    numbers = some_numbers(offset=2000)
    task = task_on(numbers)
    standardized = (numbers - numbers.mean(0)) / numbers.std(0, correction=0)
    outputs = torch.randn(50, 2)
    expected = (outputs - standardized.float()).square().mean(1)
    torch.testing.assert_close(task.loss(outputs, numbers), expected)
    assert task.loss(torch.zeros(50, 2), numbers).mean() == pytest.approx(1)
    torch.testing.assert_close(task.numbers(standardized), numbers)
    first = task.predict(standardized.float())[0]
    assert first == {"age": pytest.approx(numbers[0, 0].item()), "height": pytest.approx(numbers[0, 1].item())}


@pytest.mark.parametrize("loss", ["mse", "huber"])
def test_every_loss_meets_the_contract(loss: str) -> None:
    assert petune.check_task(f"regression:loss={loss}")


def test_huber_is_linear_in_large_errors() -> None:
    numbers = some_numbers()
    task = task_on(numbers, loss="huber", delta=0.5)
    at_mean = torch.tensor([task.state["mean"]], dtype=torch.float64)
    small, large = (task.loss(torch.full((1, 2), error), at_mean) for error in (0.1, 10.0))
    torch.testing.assert_close(small, torch.tensor([0.005]))
    torch.testing.assert_close(large, torch.tensor([0.5 * (10 - 0.25)]))


@pytest.mark.parametrize("offset", [0.0, 2000.0, 1e7])
def test_metrics_are_scikit_learns_in_the_units_of_the_targets(offset: float) -> None:
    """R² of torchmetrics is 1.005 for years, where 0.969 is right."""
    numbers = some_numbers(offset=offset)
    task = task_on(numbers)
    outputs = ((numbers - numbers.mean(0)) / numbers.std(0, correction=0)).float() + 0.2 * torch.randn(50, 2)
    meter = task.new_meter()
    for rows in torch.arange(50).split(7):
        meter.update(outputs[rows], numbers[rows])
    values = meter.compute()
    predicted = task.numbers(outputs)
    for k, name in enumerate(("age", "height")):
        y, p = numbers[:, k], predicted[:, k]
        assert values[f"mae/{name}"] == pytest.approx(sklearn_metrics.mean_absolute_error(y, p))
        assert values[f"rmse/{name}"] == pytest.approx(sklearn_metrics.root_mean_squared_error(y, p))
        assert values[f"r2/{name}"] == pytest.approx(sklearn_metrics.r2_score(y, p), abs=1e-6)
    for metric in ("mae", "rmse", "r2"):
        assert values[metric] == pytest.approx((values[f"{metric}/age"] + values[f"{metric}/height"]) / 2)
    assert {metric.name for metric in task.metrics} == values.keys()


def test_r2_of_small_residuals_and_of_equal_targets() -> None:
    targets = torch.linspace(0, 1e-3, 10, dtype=torch.float64)
    predicted = targets.flip(0)
    assert r2_score(predicted, targets) == pytest.approx(sklearn_metrics.r2_score(targets, predicted))
    assert np.isnan(r2_score(predicted, torch.ones(10, dtype=torch.float64)))


def test_a_number_that_is_the_same_in_a_split_does_not_count_in_the_mean_of_r2() -> None:
    task = task_on(some_numbers())
    meter = task.new_meter()
    numbers = some_numbers()
    numbers[:, 0] = 3
    meter.update(torch.zeros(50, 2), numbers)
    values = meter.compute()
    assert np.isnan(values["r2/age"])
    assert values["r2"] == values["r2/height"]


def test_a_single_number_has_no_metrics_by_name() -> None:
    task = task_on(some_numbers()[:, :1])
    assert [metric.name for metric in task.metrics] == ["mae", "rmse", "r2"]
    assert [metric.higher_is_better for metric in task.metrics] == [False, False, True]
    assert task.num_outputs() == 1
    assert list(task.predict(torch.zeros(1, 1))[0]) == ["age"]


@pytest.mark.parametrize("value", [3.0, 1e9, 0.1])
def test_a_constant_number_is_an_error(value: float) -> None:
    numbers = some_numbers().numpy()
    numbers[:, 1] = value
    with pytest.raises(DataError, match=r"height is .* for every training image"):
        task_on(numbers)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_number_that_is_not_finite_is_an_error(value: float) -> None:
    numbers = some_numbers().numpy()
    numbers[7, 1] = value
    with pytest.raises(DataError, match=r"not finite.*image 7.*height"):
        task_on(numbers)


def test_other_shapes_are_refused_instead_of_broadcast() -> None:
    task = task_on(some_numbers())
    for targets in (torch.ones(50, 1), torch.ones(50), torch.ones(1, 2)):
        with pytest.raises(DataError, match="shape"):
            task.loss(torch.zeros(50, 2), targets)
        with pytest.raises(DataError, match="shape"):
            task.new_meter().update(torch.zeros(50, 2), targets)


def test_mixup_interpolates_images_and_numbers_by_the_same_share() -> None:
    numbers = torch.tensor([[1e9, 0.0], [1e9 + 1, 10.0]], dtype=torch.float64)
    np.random.seed(0)
    images, mixed = task_on(numbers).mix(1.0, 0.0, 0.0)(
        torch.stack([torch.zeros(3, 2, 2), torch.ones(3, 2, 2)]), numbers
    )
    share = float(images[0, 0, 0, 0])
    assert 0 < share < 1
    assert mixed.dtype == torch.float64
    torch.testing.assert_close(mixed[0] - numbers[0], share * (numbers[1] - numbers[0]), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("options", [{"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 1.0}, {"label_smoothing": 0.1}])
def test_what_makes_no_sense_for_numbers_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="regression"):
        check_task_options(task_on(some_numbers()), TrainConfig.build(options), split(some_numbers()), 1)


@pytest.mark.parametrize("options", [{"loss": "mae"}, {"delta": 2.0}, {"loss": "huber", "delta": 0}])
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"loss|delta"):
        task_on(some_numbers(), **options)


def test_one_number_of_one_image_is_measured() -> None:
    meter = RegressionMeter(["count"], lambda outputs: outputs)
    meter.update(torch.tensor([[3.0]]), torch.tensor([[5.0]], dtype=torch.float64))
    values = meter.compute()
    assert (values["mae"], values["rmse"]) == (2, 2)
    assert math.isnan(values["r2"])
