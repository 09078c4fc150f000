"""Multi-label classification: each image has any number of labels.

Legend: N images, B batch, C classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from petune.base.errors import ConfigError, did_you_mean
from petune.base.metric import Metric
from petune.data.dataset import Split
from petune.data.target import Target
from petune.training.task import Task
from petune.training.tasks.multi_label_loss import gradient_scale, losses_of_images
from petune.training.tasks.multi_label_options import BINARY_ONLY, MultiLabelConfig
from petune.training.tasks.same_shape import check_same_shape
from petune.training.tasks.thresholds import DEFAULT, choose_thresholds

if TYPE_CHECKING:
    from petune.training.meter import Meter
    from petune.training.task import Mix
    from petune.training.tasks.multi_label_meter import MultiLabelMeter

MAP = Metric(name="map", label="mAP", percent=True)
MACRO_F1 = Metric(name="macro_f1", label="macro-F1", percent=True)
MICRO_F1 = Metric(name="micro_f1", label="micro-F1", percent=True)
COUNTED = Metric(name="classes_counted", label="classes counted")


class MultiLabel(Task[MultiLabelConfig]):
    """Labels by their sigmoid; mAP chooses the epoch. Classes that a split has no image of do not count.

    With the loss `twoway`, the loss on val depends on `eval_batch_size`; metrics do not.
    """

    target_kind = "multi_hot"
    metrics: tuple[Metric, ...] = (MAP, MACRO_F1, MICRO_F1, COUNTED)

    def __init__(self, config: MultiLabelConfig | None = None, **options: Any) -> None:
        """Configure the task; see `petune.Task`."""
        super().__init__(config, **options)
        self.needs_whole_batch = self.config.loss == "twoway"
        self.smooths_labels = self.config.loss not in BINARY_ONLY

    def bind(self, target: Target, state: dict[str, Any]) -> None:
        """Set the targets and the state; there is an average precision of each class."""
        super().bind(target, state)
        each = (Metric(name=f"ap/{n}", label=f"AP of {n}", percent=True, per_class=True) for n in target.names)
        self.metrics = (*type(self).metrics, *each)

    def fit(self, train: Split, target: Target) -> dict[str, Any]:
        """Return the weights of positives, what the loss needs to know of the labels, and its scale.

        Raises:
            ConfigError: `pos_weight` does not fit the labels.
        """
        counts = train.targets.sum(0, dtype=np.int64)
        state: dict[str, Any] = {}
        if self.config.pos_weight != "none":
            state["pos_weight"] = self._positive_weights(counts, len(train), target.names)
        if self.config.loss == "db":
            state |= {"counts": counts.tolist(), "num_images": len(train)}
        if isinstance(self.config.threshold, float):
            state["thresholds"] = [self.config.threshold] * len(target.names)
        if self.config.loss != "bce" or "pos_weight" in state:
            targets = torch.from_numpy(np.ascontiguousarray(train.targets))
            unscaled = dict(state)
            state["scale"] = gradient_scale(lambda z, y: losses_of_images(self.config, unscaled, z, y, 0.0), targets)
        return state

    def _positive_weights(self, counts: NDArray[np.int64], num_images: int, names: tuple[str, ...]) -> list[float]:
        weights = self.config.pos_weight
        if isinstance(weights, dict):
            unknown = next((name for name in weights if name not in names), None)
            if unknown is not None:
                raise ConfigError(f"pos_weight: no such class: {unknown}{did_you_mean(unknown, names)}")
            return [weights.get(name, 1.0) for name in names]
        if isinstance(weights, float):
            return [weights] * len(names)
        empty = [name for name, count in zip(names, counts.tolist(), strict=True) if not count]
        if empty:
            raise ConfigError(
                f"pos_weight=balanced: no training image has {', '.join(empty[:5])}. Add images, or use a table of "
                "weights"
            )
        # a class in every image has no negatives; a weight of 0 would switch it off
        return [(num_images - count) / count or 1.0 for count in counts.tolist()]

    def loss(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Return the loss of each image, (B,).

        Args:
            outputs: Logits (B, C).
            targets: 0 or 1, or mixed, (B, C).
            label_smoothing: Moves each target towards 0.5.
        """
        check_same_shape(outputs, targets)
        return losses_of_images(self.config, self.state, outputs, targets, label_smoothing)

    def new_meter(self) -> MultiLabelMeter:
        """Return a meter of mAP, F1 and the average precision of each class.

        Before `calibrate`, F1 is that of the thresholds that are best on the metered images: val, during training.
        """
        from petune.training.tasks.multi_label_meter import MultiLabelMeter

        return MultiLabelMeter(self.target.names, self.state.get("thresholds"), self._choose)

    def _choose(self, probabilities_NC: Tensor, targets_NC: Tensor) -> list[float]:
        return choose_thresholds(probabilities_NC, targets_NC, per_class=self.config.threshold == "per_class")

    def calibrate(self, meter: Meter | None) -> dict[str, Any]:
        """Return the thresholds that are best on val; 0.5 without val."""
        if "thresholds" in self.state:
            return {}
        if meter is None:
            return {"thresholds": [DEFAULT] * len(self.target.names)}
        return {"thresholds": self._choose(*meter.labeled_probabilities())}  # type: ignore[attr-defined]

    def mix(self, mixup: float, cutmix: float, label_smoothing: float) -> Mix:
        """Return timm's Mixup; labels become numbers between 0 and 1.

        Raises:
            ConfigError: The loss takes only 0 and 1.
        """
        if self.config.loss in BINARY_ONLY:
            raise ConfigError(
                f"mixup and cutmix do not go with the loss {self.config.loss}, which rounds mixed labels to 0 and 1. "
                "Use another loss, or set both to 0",
                cli_hint="Drop --mixup and --cutmix",
            )
        from timm.data import Mixup

        mix: Mix = Mixup(
            mixup_alpha=mixup,
            cutmix_alpha=cutmix,
            label_smoothing=label_smoothing,
            num_classes=len(self.target.names),
            multi_label=True,
        )
        return mix

    def predict(self, outputs: Tensor) -> list[dict[str, float]]:
        """Return the probabilities of the labels at or above their thresholds by name, the most probable first."""
        thresholds_C = self.state.get("thresholds", [DEFAULT] * len(self.target.names))
        predictions = []
        for probabilities_C in outputs.detach().cpu().double().sigmoid().tolist():
            rows = zip(self.target.names, probabilities_C, thresholds_C, strict=True)
            labels = [(name, probability) for name, probability, least in rows if probability >= least]
            predictions.append(dict(sorted(labels, key=lambda label: -label[1])))
        return predictions
