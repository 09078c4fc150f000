"""Regression: each image has one number, or several.

Legend: N images, B batch, K numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from petune.base.errors import ConfigError, DataError
from petune.base.metric import Metric
from petune.data.dataset import Split
from petune.data.target import Target
from petune.training.task import Task, TaskConfig
from petune.training.tasks.same_shape import check_same_shape

if TYPE_CHECKING:
    from petune.training.task import Mix
    from petune.training.tasks.regression_meter import RegressionMeter

MAE = Metric(name="mae", label="MAE", higher_is_better=False)
RMSE = Metric(name="rmse", label="RMSE", higher_is_better=False)
R2 = Metric(name="r2", label="R²")


class RegressionConfig(TaskConfig):
    """Options of regression.

    Attributes:
        loss: `mse`, or `huber`, which is linear in large errors.
        delta: Error from which `huber` is linear, in standard deviations of the training targets.
    """

    loss: Literal["mse", "huber"] = "mse"
    delta: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _delta_of_huber(self) -> Self:
        if self.loss != "huber" and self.delta != 1.0:
            raise ValueError(f"delta goes with the loss huber, not with {self.loss}")
        return self


class Regression(Task[RegressionConfig]):
    """Numbers, standardized inside by mean and deviation of the training split; metrics are in the targets' own units.

    With several numbers, a metric is the mean over them, and each has its own as `mae/NAME`. If their units differ, let
    `train.choose=r2` choose the epoch: the MAE is that of the number with the largest values.
    """

    target_kind = "number"
    metrics: tuple[Metric, ...] = (MAE, RMSE, R2)
    always_defined = (MAE.name, RMSE.name)
    head_state = ("mean", "std")

    def bind(self, target: Target, state: dict[str, Any]) -> None:
        """Set the targets and the state; several numbers have metrics of their own."""
        super().bind(target, state)
        names = target.names if len(target.names) > 1 else ()
        each = [
            Metric(
                name=f"{metric.name}/{name}",
                label=f"{metric.label} of {name}",
                higher_is_better=metric.higher_is_better,
                per_class=True,
            )
            for name in names
            for metric in type(self).metrics
        ]
        self.metrics = (*type(self).metrics, *each)

    def fit(self, train: Split, target: Target) -> dict[str, Any]:
        """Return mean and standard deviation of each number.

        Raises:
            DataError: A number is the same for all training images, or the numbers are too large.
        """
        target.check(train.targets, "the training split")
        numbers_NK = train.targets.astype(np.float64)
        constant = np.flatnonzero(numbers_NK.min(0) == numbers_NK.max(0))
        if len(constant):
            name, value = target.names[constant[0]], numbers_NK[0, constant[0]]
            raise DataError(
                f"{name} is {value:g} for every training image, so there is nothing to learn. Leave it out of the "
                "targets"
            )
        with np.errstate(over="ignore", invalid="ignore"):
            mean_K, std_K = numbers_NK.mean(0), numbers_NK.std(0)
        unusable = np.flatnonzero(~np.isfinite(mean_K) | ~np.isfinite(std_K) | (std_K == 0))
        if len(unusable):
            name = target.names[unusable[0]]
            raise DataError(f"the numbers of {name} have no finite standard deviation. Write them in another unit")
        return {"mean": mean_K.tolist(), "std": std_K.tolist()}

    def loss(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Return the loss of each image on standardized numbers, the mean over them, (B,).

        Args:
            outputs: Standardized numbers (B, K).
            targets: Numbers (B, K).
            label_smoothing: Not used; it is refused.
        """
        check_same_shape(outputs, targets)
        standardized_BK = ((targets - self._state("mean", targets)) / self._state("std", targets)).float()
        if self.config.loss == "huber":
            return F.huber_loss(outputs, standardized_BK, reduction="none", delta=self.config.delta).mean(1)
        return F.mse_loss(outputs, standardized_BK, reduction="none").mean(1)

    def numbers(self, outputs: Tensor) -> Tensor:
        """Return outputs (B, K) in the units of the targets, in float64."""
        outputs = outputs.detach().to(torch.float64)
        return outputs * self._state("std", outputs) + self._state("mean", outputs)

    def _state(self, key: str, like: Tensor) -> Tensor:
        return torch.tensor(self.state[key], dtype=like.dtype, device=like.device)

    def new_meter(self) -> RegressionMeter:
        """Return a meter of MAE, RMSE and R²."""
        from petune.training.tasks.regression_meter import RegressionMeter

        return RegressionMeter(self.target.names, self.numbers)

    def image_values(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return the absolute error of each image, the mean over its numbers."""
        return {MAE.name: (self.numbers(outputs) - targets).abs().mean(1)}

    def mix(self, mixup: float, cutmix: float, label_smoothing: float) -> Mix:
        """Return mixup: images and numbers are interpolated by the same share, in the precision of each.

        Raises:
            ConfigError: CutMix is on. The share of an image's area is not its share in a number, such as an age.
        """
        if cutmix:
            raise ConfigError(
                "cutmix does not go with the task regression: a part of an image does not have that part of its "
                "number. Use mixup, or set cutmix to 0",
                cli_hint="Drop --cutmix",
            )

        def mix(images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            share = float(np.random.beta(mixup, mixup))
            return _interpolate(images, share), _interpolate(targets, share)

        return mix

    def predict(self, outputs: Tensor) -> list[dict[str, float]]:
        """Return the numbers by name, in the units of the targets."""
        names = self.target.names
        return [dict(zip(names, numbers, strict=True)) for numbers in self.numbers(outputs.cpu()).tolist()]


def _interpolate(values: Tensor, share: float) -> Tensor:
    return share * values + (1 - share) * values.flip(0)
