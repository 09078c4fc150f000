"""AdaLoRA's rank budget: which singular values stay, decided during training by PEFT's own allocator.

AdaLoRA (Zhang et al., ICLR 2023, arXiv 2303.10512):

    y = W x + (α/r) · B diag(E) A x        E zero at the start

After every step each triplet (a row of A, of E, a column of B) gets an importance from value times gradient, smoothed.
The least important triplets are set to zero, until `target_r` per layer are left on average. The allocator's state
between steps is kept in buffers of the model, where a checkpoint finds it.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import petune
from petune.tuners.peft_bridge.wrapping import WrappedLayers

FACTORS = ("lora_A", "lora_B", "lora_E")
MEANS = ("exp_avg_ipt", "exp_avg_unc")
"""PEFT's names of the two running means: importance, and its uncertainty."""


class AllocatorState(nn.Module):
    """The allocator's state for one layer: two running means per factor, and which ranks are in use.

    The buffers are not part of a state_dict: a trained adapter does not need them.
    """

    in_use: Tensor

    def __init__(self, factors: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        for name, p in factors.items():
            for mean in MEANS:
                self.register_buffer(f"{mean}_{name}", torch.zeros_like(p, requires_grad=False), persistent=False)
        in_use = torch.ones_like(factors["lora_E"], dtype=torch.bool)
        self.register_buffer("in_use", in_use, persistent=False)


class RankBudget:
    """The schedule of ranks over a training.

    Args:
        edit: The attachment's edit.
        wrapped: AdaLoRA's layers.

    Raises:
        AttachError: The options leave no ranks to remove.
    """

    def __init__(self, edit: petune.Edit, wrapped: WrappedLayers) -> None:
        config = wrapped.config
        if config.rank_pattern is None and config.target_r >= config.init_r:
            raise petune.AttachError(
                f"AdaLoRA starts with init_r={config.init_r} ranks per layer and removes them down to "
                f"target_r={config.target_r}. Use an init_r above target_r"
            )
        self.wrapped = wrapped
        self.total_steps = 0
        self.factors = {path: _factors_of(layer, wrapped.name) for path, layer in wrapped.layers.items()}
        self.states = {path: AllocatorState(factors) for path, factors in self.factors.items()}
        attribute = f"ranks_{wrapped.name}"
        for path, layer in wrapped.layers.items():
            layer.add_module(attribute, self.states[path])
            edit.on_detach(functools.partial(delattr, layer, attribute))
        wrapped.add_modules(self.states.values())

    def on_train_start(self, total_steps: int) -> None:
        """Set the number of steps of the schedule.

        Raises:
            AttachError: Warm-up and end leave no steps in which to remove ranks, or only the first step, which would
                remove all of them.
        """
        config = self.wrapped.config
        left = max(0, total_steps - config.tinit - config.tfinal)
        if left == 0 or (left == 1 and config.tinit == 0):
            raise petune.AttachError(
                f"AdaLoRA removes ranks after the first tinit={config.tinit} and before the last "
                f"tfinal={config.tfinal} steps, which leaves {left} of the {total_steps} steps, and it needs one "
                "after the first. Lower them, or train longer"
            )
        self.total_steps = total_steps

    def orthogonality_loss(self) -> Tensor:
        """Return how far A and B are from orthogonal, times the config's weight; a scalar."""
        products = [
            square
            for factors in self.factors.values()
            for square in (factors["lora_A"] @ factors["lora_A"].T, factors["lora_B"].T @ factors["lora_B"])
        ]
        terms = [torch.linalg.matrix_norm(p - torch.eye(len(p), dtype=p.dtype, device=p.device)) for p in products]
        weight: float = self.wrapped.config.orth_reg_weight
        return weight * torch.stack(terms).mean()

    def allocate(self, steps_done: int) -> None:
        """Update the importance of the ranks with this step's gradients, and set to zero what the schedule says.

        Args:
            steps_done: From 1, including this one.

        Raises:
            AttachError: The number of steps is not known.
        """
        from peft.tuners.adalora import AdaLoraModel, RankAllocator

        if not self.total_steps:
            raise petune.AttachError(
                "AdaLoRA needs the number of training steps. Call att.on_train_start(total_steps) first"
            )
        config = copy.copy(self.wrapped.config)
        config.total_step = self.total_steps
        if sum(len(f["lora_E"]) for f in self.factors.values()) <= config.target_r * len(self.factors):
            return  # a trained adapter: the ranks are within the budget
        name = self.wrapped.name
        allocator = RankAllocator(self, config, name)  # type: ignore[no-untyped-call]
        self._restore(allocator, config)
        parts = {"peft_config": {name: config}, "trainable_adapter_name": name, "rankallocator": allocator}
        update: Any = AdaLoraModel.update_and_allocate
        update(SimpleNamespace(model=self, **parts), steps_done)
        self._store(allocator, config)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield AdaLoRA's factors: PEFT's allocator takes this object for a model and looks through its parameters."""
        for path, factors in self.factors.items():
            for factor, p in factors.items():
                yield self._key(path, factor), p

    def _restore(self, allocator: Any, config: Any) -> None:
        """Put the state of the step before into PEFT's allocator and config."""
        config.rank_pattern = {}
        for path, state in self.states.items():
            for factor, p in self.factors[path].items():
                key = self._key(path, factor)
                allocator.ipt[key] = torch.zeros_like(p, requires_grad=False)
                for mean in MEANS:
                    getattr(allocator, mean)[key] = getattr(state, f"{mean}_{factor}")
            config.rank_pattern[self._key(path, "lora_E")] = state.in_use.view(-1).tolist()

    def _store(self, allocator: Any, config: Any) -> None:
        """Copy the state out of PEFT's allocator and config."""
        for path, state in self.states.items():
            for factor in self.factors[path]:
                for mean in MEANS:
                    value = getattr(allocator, mean).get(self._key(path, factor))
                    buffer: Tensor = getattr(state, f"{mean}_{factor}")
                    buffer.copy_(torch.zeros_like(buffer) if value is None else value)
            in_use = torch.tensor(config.rank_pattern[self._key(path, "lora_E")])
            state.in_use.copy_(in_use.view(-1, 1))

    def _key(self, path: str, factor: str) -> str:
        return f"{path}.{factor}.{self.wrapped.name}"


def _factors_of(layer: Any, adapter: str) -> dict[str, nn.Parameter]:
    return {factor: getattr(layer, factor)[adapter] for factor in FACTORS}
