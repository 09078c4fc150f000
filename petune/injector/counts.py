"""Count the parameters that an attachment trains, and those of the whole model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters.

    Attributes:
        tuned: The tuner's: those it added, and the backbone's own that it unfroze.
        head: The classifier's; 0 if it does not train.
        total: All parameters of the model, adapters included.
        backbone: All parameters without the classifier's and without those that tuners added.
        classifier: The classifier's, trained or not.
    """

    tuned: int
    head: int
    total: int
    backbone: int
    classifier: int

    @property
    def trainable(self) -> int:
        """Trained parameters: tuned and head."""
        return self.tuned + self.head

    @property
    def percent_of_total(self) -> float:
        """Trained parameters as a share of all parameters, adapters included."""
        return 100 * self.trainable / self.total

    @property
    def percent_of_backbone(self) -> float:
        """Trained parameters as a share of what full fine-tuning would train. Most papers print this."""
        return 100 * self.trainable / (self.backbone + self.classifier)

    def __str__(self) -> str:
        return (
            f"tuned {self.tuned:,} + head {self.head:,} = {self.trainable:,} trainable of {self.total:,} "
            f"({self.percent_of_total:.3f} % of all, {self.percent_of_backbone:.3f} % of backbone and head)"
        )


def count_parameters(
    named: Mapping[str, nn.Parameter],
    tuned: Mapping[str, nn.Parameter],
    head: Mapping[str, nn.Parameter],
    added: set[int],
    classifier: set[int],
    entries: Collection[int] = (),
) -> Counts:
    """Count the parameters of a model with an attachment.

    Args:
        named: All parameters of the model, by key.
        tuned: Those that the tuner trains.
        head: Those of the classifier that train.
        added: Identities of those that this and other attachments have added.
        classifier: Identities of the classifier's.
        entries: Identities of vectors that hold entries of the backbone's parameters, which count once.
    """
    original = [p for p in named.values() if id(p) not in added]
    return Counts(
        tuned=_num_elements(tuned.values()),
        head=_num_elements(head.values()),
        total=_num_elements(p for p in named.values() if id(p) not in entries),
        backbone=_num_elements(p for p in original if id(p) not in classifier),
        classifier=_num_elements(p for p in original if id(p) in classifier),
    )


def _num_elements(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)
