"""Classification: each image has one class.

Legend: B batch, C classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from petune.base.metric import Metric
from petune.base.text import has_top5
from petune.data.dataset import Split
from petune.data.target import Target
from petune.training.class_weights import fit_class_weights
from petune.training.confusion import ConfusionMeter
from petune.training.task import Task, TaskConfig

if TYPE_CHECKING:
    from petune.training.task import Mix

TOP1 = Metric(name="top1", label="top-1", percent=True)
TOP5 = Metric(name="top5", label="top-5", percent=True)
MACRO_ACCURACY = Metric(name="macro_accuracy", label="macro accuracy", percent=True)
MACRO_F1 = Metric(name="macro_f1", label="macro-F1", percent=True)


def _names_as_text(table: Any) -> Any:
    """Read names of classes such as 0, which YAML reads as numbers."""
    return {str(name): weight for name, weight in table.items()} if isinstance(table, dict) else table


WeightTable = Annotated[dict[str, Annotated[float, Field(ge=0, le=1e6)]], BeforeValidator(_names_as_text)]


class ClassificationConfig(TaskConfig):
    """Options of classification.

    Attributes:
        class_weights: Weight of each class in the loss: `none`; `inverse`, so that every class has the same total
            weight; `effective`, which weighs by the effective number of images (Cui et al., 2019, arXiv 1901.05555);
            or a table of names, `{cat: 3}`, where a class that is not named counts 1. All are scaled so that the mean
            over the training images is 1, so the learning rate need not change.
        beta: Of `effective`: 0 does not weigh, values near 1 come near `inverse`. 0.999 is one of the paper's, for
            classes of hundreds to thousands of images.
    """

    class_weights: Literal["none", "inverse", "effective"] | WeightTable = "none"
    beta: float = Field(0.999, ge=0, lt=1)

    @model_validator(mode="after")
    def _beta_of_effective(self) -> Self:
        if self.class_weights != "effective" and self.beta != type(self).model_fields["beta"].default:
            raise ValueError(f"beta goes with class_weights=effective, not with {self.class_weights}")
        return self


class Classification(Task[ClassificationConfig]):
    """Cross-entropy; top-1 and top-5 accuracy, macro accuracy and macro-F1.

    With fewer than five classes, top5 is the top-C accuracy. The macro metrics are means over the classes with images.
    """

    target_kind = "class"
    metrics: tuple[Metric, ...] = (TOP1, TOP5, MACRO_ACCURACY, MACRO_F1)
    always_defined = (TOP1.name, TOP5.name, MACRO_ACCURACY.name, MACRO_F1.name)
    smooths_labels = True
    _weight_C: Tensor | None = None

    def bind(self, target: Target, state: dict[str, Any]) -> None:
        """Set the targets and the state; top-5 is not shown where it is always 100 %."""
        super().bind(target, state)
        every = type(self).metrics
        self.metrics = every if has_top5(len(target.names)) else tuple(m for m in every if m != TOP5)
        weights = state.get("class_weights")
        self._weight_C = None if weights is None else torch.tensor([weights[name] for name in target.names])

    def fit(self, train: Split, target: Target) -> dict[str, Any]:
        """Return the weight of each class by name, if classes are weighted.

        Raises:
            ConfigError: A table names an unknown class, or gives every training image the weight 0.
            DataError: A class has no training images.
        """
        weights = fit_class_weights(self.config.class_weights, self.config.beta, train, target)
        return {} if weights is None else {"class_weights": weights}

    def loss(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Return the cross-entropy of each image, (B,): -Σ_c w_c t_c log p_c, with smoothed or mixed targets t.

        Args:
            outputs: Logits (B, C).
            targets: Classes (B,), or probabilities (B, C) if they are mixed.
            label_smoothing: Probability that is spread over all classes.
        """
        weight_C = None if self._weight_C is None else self._weight_C.to(outputs.device)
        return F.cross_entropy(outputs, targets, weight_C, reduction="none", label_smoothing=label_smoothing)

    def new_meter(self) -> ConfusionMeter:
        """Return a meter of top-1, top-5 and the macro metrics."""
        return ConfusionMeter(len(self.target.names))

    def image_values(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return 100 for each image whose class is the first, or among the first five, and 0 for the others."""
        is_first_B = outputs.argmax(1) == targets  # of equal logits the first, as in the metric
        is_class_BK = outputs.topk(min(5, outputs.shape[1]), dim=1).indices == targets[:, None]
        return {TOP1.name: 100.0 * is_first_B, TOP5.name: 100.0 * is_class_BK.any(1)}

    def mix(self, mixup: float, cutmix: float, label_smoothing: float) -> Mix:
        """Return timm's Mixup, which turns classes into probabilities (B, C)."""
        from timm.data import Mixup

        mix: Mix = Mixup(
            mixup_alpha=mixup,
            cutmix_alpha=cutmix,
            label_smoothing=label_smoothing,
            num_classes=len(self.target.names),
        )
        return mix

    def predict(self, outputs: Tensor) -> list[dict[str, float]]:
        """Return the probability of each class by name, the most probable first."""
        order_BC = outputs.sort(dim=1, descending=True, stable=True).indices  # of equal logits the first, as in top1
        probabilities_BC = torch.softmax(outputs, 1).gather(1, order_BC)
        names = self.target.names
        pairs = zip(probabilities_BC.tolist(), order_BC.tolist(), strict=True)
        return [{names[c]: p for p, c in zip(row, order, strict=True)} for row, order in pairs]
