"""Record what a tuner must leave alone outside of its model: classes, torch's settings, hooks of all modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as module_hooks

SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "the default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "the default device": (torch.get_default_device, torch.set_default_device),
    "torch.is_grad_enabled()": (torch.is_grad_enabled, torch.set_grad_enabled),
    "torch.get_num_threads()": (torch.get_num_threads, torch.set_num_threads),
    "torch.get_float32_matmul_precision()": (
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
    ),
    "torch.are_deterministic_algorithms_enabled()": (
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
    ),
    "torch.is_anomaly_enabled()": (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    "torch.backends.cudnn.benchmark": (
        lambda: torch.backends.cudnn.benchmark,
        lambda on: setattr(torch.backends.cudnn, "benchmark", on),
    ),
}
"""Settings of the process: how each is read, and set."""


@dataclass(frozen=True)
class Surroundings:
    """The state of the process outside of a model, at one moment.

    Attributes:
        settings: Values of SETTINGS.
        functions: Functions by the class, or module of Python, that holds them, and their name there.
        hooks: Keys of the hooks of all modules of the process, in each of torch's registries.
    """

    settings: dict[str, Any]
    functions: dict[tuple[Any, str], Any]
    hooks: dict[str, set[int]]

    @classmethod
    def of(cls, model: nn.Module) -> Surroundings:
        """Record the classes of a model's modules, and what does not depend on it."""
        classes = dict.fromkeys(c for m in model.modules() for c in type(m).__mro__ if c is not object)
        holders = (*classes, torch.Tensor, F)
        functions = {(h, name): value for h in holders for name, value in vars(h).items() if callable(value)}
        return cls(
            {name: read() for name, (read, _) in SETTINGS.items()},
            functions,
            {name: {*hooks} for name, hooks in _registries().items()},
        )

    def restored(self) -> str:
        """Restore what is no longer so, and say what that was; empty if nothing was."""
        changes = []
        for name, (read, write) in SETTINGS.items():
            if (now := read()) != self.settings[name]:
                changes.append(f"{name} is now {now}, before it was {self.settings[name]}")
                write(self.settings[name])
        for (holder, name), value in self.functions.items():
            if vars(holder).get(name) is not value:
                kind = "class" if isinstance(holder, type) else "module"
                changes.append(f"{name} of the {kind} {holder.__name__} was replaced, which changes other models too")
                setattr(holder, name, value)
        left = [(hooks, key) for name, hooks in _registries().items() for key in hooks.keys() - self.hooks[name]]
        for hooks, key in left:
            del hooks[key]
        if left:
            changes.append("a hook for the modules of all models was left behind (register_module_forward_hook, …)")
        return "; ".join(changes)


def _registries() -> dict[str, dict[int, Any]]:
    """Return what torch calls for every module of the process, by the names of its registries."""
    named = vars(module_hooks).items()
    return {name: value for name, value in named if name.startswith("_global_") and isinstance(value, dict)}
