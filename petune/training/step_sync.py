"""Exchange gradients and flags among processes at every training step, in one message."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from petune.base.distributed import Group


@dataclass(frozen=True)
class StepRequest:
    """Requests of a process after a step.

    Attributes:
        stop: Save a checkpoint and stop, because a signal came.
        save: Save a checkpoint, because the last one is old.
    """

    stop: bool
    save: bool


class StepSync:
    """Adds up gradients over a group, and lets all its processes do what one of them requests.

    Args:
        group: The processes that train together.
        model: Running statistics of its BatchNorm layers become their mean, since each process sees other images.
        parameters: What trains, in the same order on all processes.
        sharded: Whether the processes already meet inside the forward, because frozen blocks are spread over them.
    """

    def __init__(self, group: Group, model: nn.Module, parameters: Sequence[nn.Parameter], sharded: bool) -> None:
        self.group = group
        self.model = model
        self.parameters = parameters
        self.sharded = sharded
        self._agreed: StepRequest | None = None

    def backward(self, work: Callable[[], Tensor], request: Callable[[], StepRequest], num_images: int) -> Tensor:
        """Run the backward of this process's images; gradients become those of the whole batch.

        Args:
            work: Computes gradients, and returns this process's part of the loss.
            request: Returns what this process requests to be done after the step.
            num_images: Images of the whole batch, of all processes together.

        Returns:
            The loss of the whole batch.

        Raises:
            Exception: What failed on any process.
        """
        if self.group.size == 1:
            return work()
        own, errors = request(), list[Exception]()
        loss = torch.zeros((), device=self.parameters[0].device)
        # in a sharded model the others wait inside their forward, so an error must not wait for the next meeting
        with nullcontext() if self.sharded else self.group.collect_errors(errors):
            loss = work()
        flags = torch.tensor([bool(errors), own.stop, own.save], dtype=torch.float32, device=loss.device)
        statistics = _running_statistics(self.model)
        part = self.group.shard(num_images)
        for tensor in statistics:
            tensor.mul_((part.stop - part.start) / num_images)
        self.group.all_reduce_gradients(self.parameters, [flags, loss, *statistics])
        failed, stop, save = (bool(flag) for flag in flags.tolist())
        if failed:
            self.group.any_rank(errors=errors)
        self._agreed = StepRequest(stop, save)
        return loss

    def agreed(self, own: StepRequest) -> StepRequest:
        """Return what all processes do after the step: `own` of a single one, else what any requested during it."""
        return own if self._agreed is None else self._agreed

    def share_initial_values(self, tensors: Mapping[str, Tensor]) -> None:
        """Give all processes the values of the main one: their own may differ in the last bit."""
        if self.group.size == 1:
            return
        values = self.group.broadcast(lambda: {key: t.detach().cpu() for key, t in tensors.items()})
        with torch.no_grad():
            for key, tensor in tensors.items():
                tensor.copy_(values[key])


def _running_statistics(model: nn.Module) -> list[Tensor]:
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training]
    return [t for norm in norms for t in (norm.running_mean, norm.running_var) if t is not None]
