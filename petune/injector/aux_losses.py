"""The losses that adapters set in their forwards, on their way into the loss of a training loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from petune.base.errors import AttachError
from petune.injector.edit_log import EditLog
from petune.injector.registry import call_hook
from petune.injector.tuner import Tuner


class AuxLosses:
    """Collects the `aux_loss` of the adapters of one attachment.

    Attributes:
        exist: True if there are such adapters.
    """

    def __init__(self, name: str, tuner: Tuner[Any], log: EditLog) -> None:
        self._name = name
        self._tuner = tuner
        self._log = log
        self._was_taken = False
        self.exist = any(hasattr(holder.adapter, "aux_loss") for holder, _ in log.placed)

    @property
    def training_calls(self) -> frozenset[str]:
        """The calls that a training loop must make for the method."""
        return self._tuner.training_calls | ({"loss"} if self.exist else set())

    def take(self, *, by_micro_batch: bool = False) -> Tensor | float:
        """Return the loss of the forwards since the last call; 0.0 if there is none.

        Args:
            by_micro_batch: True for a call that comes after each forward; another one may follow in the same step.

        Raises:
            AttachError: No forward has set one.
        """
        if not self.exist:
            return 0.0
        values = [loss for holder, _ in self._log.placed for loss in holder.aux_losses]
        for holder, _ in self._log.placed:
            holder.aux_losses = []
        was_taken, self._was_taken = self._was_taken, by_micro_batch
        if values:
            term: Tensor = call_hook(self._tuner, "aux_loss", values)
            return term
        is_off = not any(holder.enabled for holder, _ in self._log.placed)
        if is_off or was_taken or not torch.is_grad_enabled():
            return 0.0
        raise AttachError(
            f"{self._name} has adapters with an aux_loss, but no forward with gradients in train mode has set one "
            "since the last call. Compute the loss after the forward, and use gradient checkpointing with "
            "use_reentrant=False"
        )
