"""Let transformers' gradient checkpointing act on frozen layers.

A layer of transformers runs again in the backward pass if `gradient_checkpointing_enable()` was called and the layer is
in train mode. Frozen layers are in eval mode, so that their dropout is off. Here a layer is in train mode only while it
decides, and in eval mode while it runs, in the repetition too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from petune.base.errors import AttachError

FUNCTION = "_gradient_checkpointing_func"
"""The attribute in which transformers keeps the function that runs a layer and repeats it."""


class LayerCheckpointing:
    """Hooks on all layers of a model that checkpoint themselves; bound methods follow a deep copy of the model.

    Attributes:
        model: The model, whose own `training` flag says whether it trains.
        functions: Transformers' own function for the layers that are running.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.functions: dict[nn.Module, Callable[..., Any]] = {}

    def hook(self) -> list[RemovableHandle]:
        """Put the hooks on the layers."""
        handles: list[RemovableHandle] = []
        for module in self.model.modules():
            if any(c.__name__ == "GradientCheckpointingLayer" for c in type(module).__mro__):
                handles.append(module.register_forward_pre_hook(self.enter))
                handles.append(module.register_forward_hook(self.leave, always_call=True))
        return handles

    def enter(self, module: nn.Module, args: Any) -> None:
        """Put a frozen layer in train mode, until it has decided; pre-hook.

        Raises:
            AttachError: Checkpointing is on, but not possible for frozen layers.
        """
        wanted = getattr(module, "gradient_checkpointing", False) and self.model.training
        if not wanted or module.training or not torch.is_grad_enabled():
            return
        function: Any = getattr(module, FUNCTION)
        _check_possible(module, function)
        self.functions[module] = function
        module.__dict__[FUNCTION] = functools.partial(_checkpoint_frozen, function, module)
        module.training = True

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Put the layer back in eval mode; hook, also called after an exception."""
        function = self.functions.pop(module, None)
        if function is not None:
            module.__dict__[FUNCTION] = function
            module.training = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "functions": {}}


def _check_possible(module: nn.Module, function: Any) -> None:
    name = type(module).__name__
    if getattr(function, "keywords", {}).get("use_reentrant"):
        raise AttachError(
            f"gradient checkpointing with use_reentrant=True gives the adapters in {name} no or wrong gradients. Use "
            'gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})'
        )
    forward: Any = type(module).forward
    if FUNCTION not in getattr(getattr(forward, "__code__", None), "co_names", ()):  # older: __call__ decides
        raise AttachError(
            f"gradient checkpointing of this version of transformers leaves out frozen layers, such as {name}. Update "
            "transformers, or train with petune's own: grad_checkpointing=true",
            cli_hint="Use --grad-checkpointing",
        )


def _checkpoint_frozen(checkpoint: Callable[..., Any], module: nn.Module, run: Callable[..., Any], *args: Any) -> Any:
    return checkpoint(functools.partial(_run_in_eval, module, run), *args)


def _run_in_eval(module: nn.Module, run: Callable[..., Any], *args: Any) -> Any:
    was_training = module.training
    module.training = False
    try:
        return run(*args)
    finally:
        module.training = was_training
