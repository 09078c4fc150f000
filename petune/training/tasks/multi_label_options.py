"""Options of multi-label classification."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from petune.training.task import TaskConfig

LossName = Literal["bce", "asl", "poly", "db", "zlpr", "twoway"]
BINARY_ONLY = frozenset({"zlpr", "twoway"})
"""Losses that round targets to 0 and 1, so that smoothed or mixed ones would be changed without a word."""
WEIGHTED = frozenset({"bce", "asl"})
"""Losses that take weights of positives."""
Positive = Annotated[float, Field(gt=0)]


class MultiLabelConfig(TaskConfig):
    """Options of multi-label classification.

    Attributes:
        loss: `bce` (binary cross-entropy), `asl` (asymmetric loss, 2009.14119), `poly` (2204.12511), `db`
            (distribution-balanced loss for rare labels, 2007.09654), `zlpr` (2208.02955) or `twoway` (Kobayashi, CVPR
            2023). All are scaled to the gradient of BCE at zero logits, so that a learning rate serves all.
        pos_weight: Weight of the positives in `bce` and `asl`: `none`, `balanced` (negatives per positive of each
            class), a number, or a table `{class: number}`.
        gamma_pos, gamma_neg, clip: Of `asl`; the defaults are the paper's.
        threshold: The probability from which on a label is predicted. `one` (chosen on val by macro-F1), `per_class`
            (chosen on val by the F1 of each class; needs some positives of each), or a number.
    """

    loss: LossName = "bce"
    pos_weight: Literal["none", "balanced"] | Positive | dict[str, Positive] = "none"
    gamma_pos: float = Field(1.0, ge=0)
    gamma_neg: float = Field(4.0, ge=0)
    clip: float = Field(0.05, ge=0, lt=1)
    threshold: Literal["one", "per_class"] | Annotated[float, Field(gt=0, lt=1)] = "one"

    @model_validator(mode="after")
    def _options_of_the_loss(self) -> Self:
        if self.pos_weight != "none" and self.loss not in WEIGHTED:
            raise ValueError(f"pos_weight goes with the losses {' and '.join(sorted(WEIGHTED))}, not with {self.loss}")
        of_asl = sorted({"gamma_pos", "gamma_neg", "clip"} & self.model_fields_set)
        if of_asl and self.loss != "asl" and self.model_copy(update=_ASL_DEFAULTS) != self:
            raise ValueError(f"{', '.join(of_asl)} goes with the loss asl, not with {self.loss}")
        return self


_ASL_DEFAULTS = {name: MultiLabelConfig.model_fields[name].default for name in ("gamma_pos", "gamma_neg", "clip")}
