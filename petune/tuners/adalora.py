"""AdaLoRA's budget of ranks: which singular values stay, decided while training by PEFT's own allocator.

    AdaLoRA (Zhang et al., ICLR 2023, arXiv 2303.10512):    y = W x + (α/r) · B diag(E) A x     E zero at the start

Every step each triplet (a row of A, of E, a column of B) gets a logit from value times gradient, smoothed; those of the
lowest logits are set to zero, until `target_r` a layer are left on average. What the allocator remembers between steps
is kept in buffers of the model, where a checkpoint finds it.
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
from petune.tuners.peft_layers import Wrapped

FACTORS = ("lora_A", "lora_B", "lora_E")
MEANS = ("exp_avg_ipt", "exp_avg_unc")


class Memory(nn.Module):
    """What the allocator remembers of one layer: two running means a factor, and which ranks are in use.

    The buffers are no part of a state_dict: an adapter that is used has no need of them.
    """

    in_use: Tensor

    def __init__(self, factors: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        for name, p in factors.items():
            for mean in MEANS:
                self.register_buffer(f"{mean}_{name}", torch.zeros_like(p, requires_grad=False), persistent=False)
        in_use = torch.ones_like(factors["lora_E"], dtype=torch.bool)
        self.register_buffer("in_use", in_use, persistent=False)


class Budget:
    """The schedule of ranks over a training.

    Args:
        edit: Of the attachment.
        wrapped: AdaLoRA's layers.

    Raises:
        AttachError: The options leave no ranks to take away.
    """

    def __init__(self, edit: petune.Edit, wrapped: Wrapped) -> None:
        config = wrapped.config
        if config.rank_pattern is None and config.target_r >= config.init_r:
            raise petune.AttachError(
                f"AdaLoRA begins with init_r ranks a layer and ends with target_r, so init_r must be the greater one, "
                f"but they are {config.init_r} and {config.target_r}"
            )
        self.wrapped, self.total_steps = wrapped, 0
        self.factors = {path: _factors(layer, wrapped.name) for path, layer in wrapped.layers.items()}
        self.memory = {path: Memory(factors) for path, factors in self.factors.items()}
        attribute = f"ranks_{wrapped.name}"
        for path, layer in wrapped.layers.items():
            layer.add_module(attribute, self.memory[path])
            edit.on_detach(functools.partial(delattr, layer, attribute))
        wrapped.add_modules(self.memory.values())

    def on_train_start(self, total_steps: int) -> None:
        """Lay the schedule over so many steps.

        Raises:
            AttachError: Warm-up and end leave none to take ranks away in.
        """
        config = self.wrapped.config
        if config.tinit + config.tfinal >= total_steps:
            raise petune.AttachError(
                f"AdaLoRA takes ranks away between its first tinit and its last tfinal steps, so {config.tinit} and "
                f"{config.tfinal} must leave some of all {total_steps}; lower them, or train longer"
            )
        self.total_steps = total_steps

    def regularity(self) -> Tensor:
        """How far A and B are from orthogonal, as AdaLoRA's loss has it; a scalar with the config's weight."""
        terms = [
            torch.linalg.matrix_norm(square - torch.eye(len(square), dtype=square.dtype, device=square.device))
            for factors in self.factors.values()
            for square in (factors["lora_A"] @ factors["lora_A"].T, factors["lora_B"].T @ factors["lora_B"])
        ]
        weight: float = self.wrapped.config.orth_reg_weight
        return weight * torch.stack(terms).mean()

    def allocate(self, steps_done: int) -> None:
        """Score the ranks by this step's gradients, and set to zero what the schedule says.

        Args:
            steps_done: From 1, this one among them.

        Raises:
            AttachError: It was not told how many there are.
        """
        import peft.tuners.adalora as theirs

        if not self.total_steps:
            raise petune.AttachError(
                "AdaLoRA needs the number of training steps: call att.on_train_start(total_steps) first"
            )
        config = copy.copy(self.wrapped.config)
        config.total_step = self.total_steps
        if sum(len(f["lora_E"]) for f in self.factors.values()) <= config.target_r * len(self.factors):
            return  # an adapter that had its training: the ranks are within the budget
        allocate: Any = theirs.AdaLoraModel.update_and_allocate
        make: Any = theirs.RankAllocator
        name, allocator = self.wrapped.name, make(self, config, self.wrapped.name)
        self._remind(allocator, config)
        shell = {"peft_config": {name: config}, "trainable_adapter_name": name, "rankallocator": allocator}
        allocate(SimpleNamespace(model=self, **shell), steps_done)
        self._remember(allocator, config)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What PEFT's allocator looks through in a model: here AdaLoRA's factors only, whatever the names of others."""
        for path, factors in self.factors.items():
            for name, p in factors.items():
                yield f"{path}.{name}.{self.wrapped.name}", p

    def _remind(self, allocator: Any, config: Any) -> None:
        config.rank_pattern = {}
        for path, memory in self.memory.items():
            for name, p in self.factors[path].items():
                key = f"{path}.{name}.{self.wrapped.name}"
                allocator.ipt[key] = torch.zeros_like(p, requires_grad=False)
                for mean in MEANS:
                    getattr(allocator, mean)[key] = getattr(memory, f"{mean}_{name}")
            config.rank_pattern[f"{path}.lora_E.{self.wrapped.name}"] = memory.in_use.view(-1).tolist()

    def _remember(self, allocator: Any, config: Any) -> None:
        for path, memory in self.memory.items():
            for name in self.factors[path]:
                for mean in MEANS:
                    value = getattr(allocator, mean).get(f"{path}.{name}.{self.wrapped.name}")
                    buffer: Tensor = getattr(memory, f"{mean}_{name}")
                    buffer.copy_(torch.zeros_like(buffer) if value is None else value)
            in_use = torch.tensor(config.rank_pattern[f"{path}.lora_E.{self.wrapped.name}"])
            memory.in_use.copy_(in_use.view(-1, 1))


def _factors(layer: Any, name: str) -> dict[str, nn.Parameter]:
    return {factor: getattr(layer, factor)[name] for factor in FACTORS}
