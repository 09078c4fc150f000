"""Check that a training loop makes the calls that a method needs; without them it would silently train another one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from petune.base.errors import AttachError

CALLS = {
    "calibrate": "Call att.calibrate(batches) with training batches before the first step",
    "on_train_start": "Call att.on_train_start(total_steps) before the first step",
    "loss": "Add it in each step: loss = loss + att.loss(step)",
    "on_step_end": "Call att.on_step_end(step) after each optimizer.step(), and let that change parameters once "
    "(LBFGS: max_iter=1)",
}
"""The calls that a method can need, and the advice to a loop without it."""
REASONS = {
    "calibrate": "chooses what it trains on training batches",
    "on_train_start": "needs the number of training steps",
    "loss": "has a loss term of its own, which this training loop does not add",
    "on_step_end": "must know when a step has ended",
}


NUM_SAMPLES = 64
"""Fused optimizers, and those that write to `.data`, do not count as writes; some values are compared for them."""


class LoopCheck:
    """Watch the gradients of one attachment for a new optimizer step, and check what was called since the last one.

    A new step has begun when a gradient arrives after the parameter's values changed, so any number of micro-batches
    may belong to one step. Gradients are watched rather than forwards, because they arrive in every kind of training:
    compiled, with gradient checkpointing, through a part of the model. A call must be missing twice in a row, since an
    optimizer may need two backwards for a step (SAM).

    Args:
        name: The attachment, for messages.
        needed: The calls that the method needs, keys of `CALLS`.
        parameters: What the method trains. The first one that gets a gradient is watched from then on.
        is_calibrated: Returns True if the method was calibrated, now or before it was saved.
    """

    def __init__(
        self,
        name: str,
        needed: frozenset[str],
        parameters: Iterable[nn.Parameter],
        is_calibrated: Callable[[], bool] = lambda: True,
    ) -> None:
        self._name = name
        self._needed = needed
        self._is_calibrated = is_calibrated
        self._called: set[str] = set()
        self._missing_before: set[str] = set()
        self._started = False
        self._calibrated = False
        self._paused = False
        self._changed_before_pause = False
        self._watched: Tensor | None = None
        self._last: tuple[int, Tensor] | None = None
        self._handles: list[Any] = []
        for p in parameters if needed else ():
            self._handles.append(p.register_post_accumulate_grad_hook(self._on_gradient))  # type: ignore[no-untyped-call]

    def record(self, call: str) -> None:
        """Record that the loop made a call."""
        self._called.add(call)
        self._started |= call == "on_train_start"

    def pause(self) -> None:
        """Stop checking while the attachment is disabled: that changes parameters too."""
        self._paused = True
        self._changed_before_pause = self._has_changed()

    def resume(self) -> None:
        """Check again."""
        self._paused = False
        if self._watched is not None and not self._changed_before_pause:
            self._last = _state_of(self._watched)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop checking inside the context."""
        self.pause()
        try:
            yield
        finally:
            self.resume()

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _on_gradient(self, parameter: Tensor) -> None:
        if self._paused or (self._watched is not None and parameter is not self._watched):
            return
        if self._watched is None:
            self._watched = parameter
        elif self._has_changed():
            self._require_start()
            self._require_calls()
        else:
            return
        self._last = _state_of(parameter)
        self._called.clear()

    def _has_changed(self) -> bool:
        """Return True if the watched parameter has other values than when its last step began."""
        if self._watched is None or self._last is None:
            return False
        version, values = _state_of(self._watched)
        version_before, values_before = self._last
        if version != version_before or values.device != values_before.device:
            return True
        return not torch.equal(values, values_before)

    def _require_start(self) -> None:
        if "calibrate" in self._needed and not self._calibrated:
            self._calibrated = self._is_calibrated()
            if not self._calibrated:
                self._fail("calibrate")
        if "on_train_start" in self._needed and not self._started:
            self._fail("on_train_start")

    def _require_calls(self) -> None:
        missing = self._needed - self._called - {"on_train_start", "calibrate"}
        repeated = missing & self._missing_before
        self._missing_before = set(missing)
        if repeated:
            self._fail(next(call for call in CALLS if call in repeated))

    def _fail(self, call: str) -> NoReturn:
        raise AttachError(f"{self._name} {REASONS[call]}. {CALLS[call]}")


def _state_of(parameter: Tensor) -> tuple[int, Tensor]:
    """Return what changes with the values: the version, and some values for writes that PyTorch does not count."""
    values = parameter.detach().flatten()
    return parameter._version, values[:: max(1, len(values) // NUM_SAMPLES)].clone()
