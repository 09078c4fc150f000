"""The losses that adapters set in their forwards, on their way into the loss of a training loop."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from petune.base.errors import AttachError
from petune.injector.edit_log import EditLog
from petune.injector.hooks.base import Holder
from petune.injector.registry import call_hook
from petune.injector.tuner import Tuner
from petune.sites.returned import tensors_returned


class Graph:
    """Exists as long as the autograd graph of one forward's output."""


class Forwards:
    """Tells the forwards of a model apart, so that an abandoned one leaves no loss to the next step.

    The last forward counts. An earlier one counts as long as something still holds its output, or a loss made of it, as
    in a step with two views of an image.

    Args:
        holders: Of the adapters. Bound methods of this object follow a deep copy of the model.
    """

    def __init__(self, holders: Sequence[Holder]) -> None:
        self.holders = holders
        self.graph: weakref.ref[Graph] | None = None
        self.earlier: list[tuple[weakref.ref[Graph], list[list[Tensor]]]] = []

    def enter(self, module: nn.Module, args: Any) -> None:
        """Set the losses of an earlier forward aside; those of one that an exception ended are dropped."""
        if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and module.training):
            return
        losses = self._pop()
        if self.graph is not None and any(losses):
            self.earlier.append((self.graph, losses))
        self.graph = None
        self.earlier = [item for item in self.earlier if item[0]() is not None]

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Let the graph of the output show how long it is needed."""
        if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and module.training):
            return
        graph = Graph()
        self.graph = weakref.ref(graph)
        for tensor in tensors_returned(output):
            if tensor.grad_fn is not None:
                metadata: Any = tensor.grad_fn.metadata  # torch's stubs call it a method
                metadata[f"petune_forward_{id(self)}"] = graph  # each attachment has its own

    def take(self) -> list[Tensor]:
        """Return the losses that count, in the order in which the adapters were declared; none is left."""
        alive = [losses for graph, losses in self.earlier if graph() is not None]
        self.earlier, self.graph = [], None
        return [loss for of_holder in zip(*alive, self._pop(), strict=True) for losses in of_holder for loss in losses]

    def clear(self) -> None:
        """Drop all losses."""
        self.take()

    def _pop(self) -> list[list[Tensor]]:
        losses = [holder.aux_losses for holder in self.holders]
        for holder in self.holders:
            holder.aux_losses = []
        return losses

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "graph": None, "earlier": []}  # a copy of a model must not carry an activation


class AuxLosses:
    """Collects the `aux_loss` of the adapters of one attachment.

    Attributes:
        exist: True if there are such adapters.
    """

    def __init__(self, name: str, model: nn.Module, tuner: Tuner[Any], log: EditLog) -> None:
        self._name = name
        self._tuner = tuner
        self._log = log
        self._was_taken = False
        self.exist = any(hasattr(holder.adapter, "aux_loss") for holder, _ in log.placed)
        self._forwards = Forwards([holder for holder, _ in log.placed])
        if self.exist:
            hooks = (
                model.register_forward_pre_hook(self._forwards.enter, prepend=True),
                model.register_forward_hook(self._forwards.leave),
            )
            log.undo_steps += [hook.remove for hook in hooks]
            log.undo_steps.append(self._forwards.clear)
            log.toggles.append(lambda on: self._forwards.clear())

    @property
    def training_calls(self) -> frozenset[str]:
        """The calls that a training loop must make for the method."""
        return self._tuner.training_calls | ({"loss"} if self.exist else set())

    def take(self, *, by_micro_batch: bool = False) -> Tensor | float:
        """Return the loss of the forwards since the last call, see `Forwards`; 0.0 if there is none.

        Args:
            by_micro_batch: True for a call that comes after each forward; another one may follow in the same step.

        Raises:
            AttachError: No forward has set one.
        """
        if not self.exist:
            return 0.0
        values = self._forwards.take()
        was_taken, self._was_taken = self._was_taken, by_micro_batch
        if values:
            term: Tensor = call_hook(self._tuner, "aux_loss", values)
            return term
        is_off = not any(holder.enabled for holder, _ in self._log.placed)
        is_step = was_taken and not by_micro_batch  # the losses of its micro-batches have been taken
        if is_off or is_step or not torch.is_grad_enabled():
            return 0.0
        raise AttachError(
            f"{self._name} has adapters with an aux_loss, but no forward with gradients in train mode has set one "
            "since the last call. Compute the loss after the forward, and use gradient checkpointing with "
            "use_reentrant=False"
        )
