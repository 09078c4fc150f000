"""How many parameters an attachment has, and of how many."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Counts:
    """How many parameters there are.

    Attributes:
        tuned: The tuner's: added ones, and the backbone's own that it unfroze.
        head: The classifier's, where it trains.
        total: All of the model as attached.
        backbone: All without classifier and without what tuners added.
        classifier: The classifier's, trained or not.
    """

    tuned: int
    head: int
    total: int
    backbone: int
    classifier: int

    @property
    def trainable(self) -> int:
        """Tuned and head."""
        return self.tuned + self.head

    @property
    def percent_of_total(self) -> float:
        """Trainable over all of the model, adapters included."""
        return 100 * self.trainable / self.total

    @property
    def percent_of_backbone(self) -> float:
        """Trainable over backbone and classifier: what full fine-tuning would train. Papers mostly print this."""
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
) -> Counts:
    """Count.

    Args:
        named: All parameters of the model.
        tuned, head: Those that train.
        added: Identities of those that attachments added, this one and others.
        classifier: Identities of the classifier's.
    """

    def count(parameters: Iterable[nn.Parameter]) -> int:
        return sum(p.numel() for p in parameters)

    old = [p for p in named.values() if id(p) not in added]
    return Counts(
        tuned=count(tuned.values()),
        head=count(head.values()),
        total=count(named.values()),
        backbone=count(p for p in old if id(p) not in classifier),
        classifier=count(p for p in old if id(p) in classifier),
    )
