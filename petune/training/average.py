"""An exponential moving average (EMA) of what trains, in float32.

timm's `ModelEmaV3` copies the whole model, averages in the parameters' own number format (in which bfloat16 drifts and
float16 never changes), and warms up only if it is told the step. This one has the same decay at each step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

WARMUP_POWER = 2 / 3
"""timm's default: the decay at step t is at most 1 - t^(-2/3), so it is 0.99 after 1,000 steps."""


class Average:
    """Average of parameters over the steps of a training; without a decay it does nothing.

    Buffers, such as statistics of BatchNorm, are not averaged: the model's own are used.

    Args:
        params: Everything that trains, by key.
        decay: Share of the average that a step keeps, once the warm-up is over; None turns the average off.

    Attributes:
        values: The averages by key, float32; empty before the first step.
    """

    def __init__(self, params: Mapping[str, nn.Parameter], decay: float | None) -> None:
        self.params = params
        self.decay = decay
        self.values: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters after a step.

        Args:
            step: Number of steps done; the first one is 1, and its values are copied.
        """
        if self.decay is None:
            return
        if not self.values:
            self.values = {key: p.detach().float().clone() for key, p in self.params.items()}
            return
        weight = 1 - min(self.decay, 1 - step**-WARMUP_POWER)
        for key, p in self.params.items():
            self.values[key].lerp_(p.detach().float(), weight)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the model the averages inside, and its own values back afterwards."""
        own = {key: p.detach().clone() for key, p in self.params.items()} if self.values else {}
        self.apply()
        try:
            yield
        finally:
            _copy(own, self.params)

    def apply(self) -> None:
        """Give the model the averages, if there are any."""
        _copy(self.values, self.params)

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Continue from the averages of a checkpoint."""
        self.values = {key: tensor.to(self.params[key].device, torch.float32) for key, tensor in values.items()}


@torch.no_grad()
def _copy(sources: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> None:
    for key, source in sources.items():
        targets[key].copy_(source)
