"""A task on made-up targets, as the properties of the contract look at it.

Legend: N images, C classes, K numbers, S side of a mask.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from petune.data.dataset import Split
from petune.data.target import Target, TargetKind
from petune.training.meter import Meter
from petune.training.task import Task

NUM_IMAGES = 24
NUM_CLASSES = 6
NUMBERS = ("height", "weight")
SIDE = 16
STEPS, LR = 60, 0.2


@dataclass(frozen=True)
class TaskTrial:
    """A task, fitted to made-up targets of its kind.

    Attributes:
        task: The task; `fit` and `bind` are called when it is first used.
    """

    task: Task[Any]

    def __post_init__(self) -> None:
        """Fit and bind the task."""
        self.task.bind(self.target, {})
        self.task.bind(self.target, self.task.fit(self.split, self.target))

    @cached_property
    def target(self) -> Target:
        """Kind and names."""
        kind = self.task.target_kind
        names = NUMBERS if kind == "number" else tuple(f"class {i}" for i in range(NUM_CLASSES))
        return Target(kind, names)

    @cached_property
    def split(self) -> Split:
        """Black images with these targets."""
        return Split.of(np.zeros((NUM_IMAGES, 8, 8, 3), np.uint8), _made_up(self.task.target_kind))

    @property
    def targets(self) -> Tensor:
        """A copy of the targets, as a batch has them."""
        return torch.from_numpy(self.split.targets.copy())

    @cached_property
    def outputs(self) -> Tensor:
        """Random outputs of a head: (N, outputs), or (N, outputs, S, S) for masks."""
        pixels = (SIDE, SIDE) if self.task.target_kind == "mask" else ()
        generator = torch.Generator().manual_seed(0)
        return torch.randn(NUM_IMAGES, self.task.num_outputs(), *pixels, generator=generator)

    @cached_property
    def fitted_outputs(self) -> Tensor:
        """The outputs after gradient steps on them."""
        outputs = self.outputs.clone().requires_grad_()
        optimizer = torch.optim.Adam([outputs], lr=LR)
        for _ in range(STEPS):
            optimizer.zero_grad()
            self.loss(outputs).mean().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return outputs.detach()

    def loss(self, outputs: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return the loss of each image, called as training calls it."""
        return self.task.loss(outputs, self.targets if targets is None else targets, 0.0)

    def measured(self, outputs: Tensor, batch_size: int) -> dict[str, float]:
        """Return the metrics of outputs that arrive in batches."""
        return dict(self.metered(outputs, batch_size).compute())

    def metered(self, outputs: Tensor, batch_size: int) -> Meter:
        """Return a meter of the task that was updated with outputs in batches."""
        meter = self.task.new_meter().to(torch.device("cpu"))
        for start in range(0, len(outputs), batch_size):
            meter.update(outputs[start : start + batch_size], self.targets[start : start + batch_size])
        return meter

    def restored(self, calibrated: dict[str, Any] | None = None) -> Task[Any]:
        """Return another task with the same options, state and targets, all of which went through JSON.

        Args:
            calibrated: What `calibrate` returned, if the state is that of the end of a training.
        """
        values = (self.task.config.plain(), {**self.task.state, **(calibrated or {})})
        options, state = (json.loads(json.dumps(value)) for value in values)
        again = type(self.task)(type(self.task).Config.build(options, "the options"))
        again.bind(self.target, state)
        return again


def _made_up(kind: TargetKind) -> NDArray[Any]:
    """Return targets that have every class, and numbers far from zero."""
    rng = np.random.default_rng(0)
    classes_N = np.arange(NUM_IMAGES) % NUM_CLASSES
    if kind == "class":
        return classes_N.astype(np.int64)
    if kind == "multi_hot":
        return (rng.random((NUM_IMAGES, NUM_CLASSES)) < 0.3).astype(np.uint8) | np.eye(NUM_CLASSES, dtype=np.uint8)[
            classes_N
        ]
    if kind == "number":
        return rng.normal((170.0, 70.0), (10.0, 15.0), (NUM_IMAGES, len(NUMBERS)))
    masks_NSS = np.broadcast_to(classes_N[:, None, None], (NUM_IMAGES, SIDE, SIDE)).astype(np.uint8)
    masks_NSS[:, : SIDE // 2] = 0
    return masks_NSS
