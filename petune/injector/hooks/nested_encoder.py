"""Let torch's TransformerEncoder train with a padding mask when its layers are frozen.

It packs the tokens into a nested tensor if its first layer is in eval mode and has no weight that trains, as a frozen
one. A layer with gradients cannot read that. Here it packs only without gradients, as a model that trains whole does.
Layers with adapters at their modules cannot read it in either case, so there it packs, and `attach` refuses the method.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from petune.injector.hooks.prompts import is_adapter_hook

ATTRIBUTE = "use_nested_tensor"


class NestedEncoders:
    """Hooks on the encoders of a model; bound methods follow a deep copy of the model.

    Attributes:
        model: The model.
        running: The encoders that are running and do not pack.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.running: set[nn.Module] = set()

    def hook(self) -> list[RemovableHandle]:
        """Put the hooks on the encoders."""
        handles: list[RemovableHandle] = []
        for module in self.model.modules():
            if isinstance(module, nn.TransformerEncoder) and getattr(module, ATTRIBUTE, False):
                handles.append(module.register_forward_pre_hook(self.enter))
                handles.append(module.register_forward_hook(self.leave, always_call=True))
        return handles

    def enter(self, module: nn.Module, args: Any) -> None:
        """Let an encoder not pack in a forward with gradients; pre-hook."""
        if torch.is_grad_enabled() and getattr(module, ATTRIBUTE, False) and not _has_adapters(module):
            self.running.add(module)
            setattr(module, ATTRIBUTE, False)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Let it pack again; hook, also called after an exception."""
        if module in self.running:
            self.running.remove(module)
            setattr(module, ATTRIBUTE, True)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "running": set()}


def _has_adapters(encoder: nn.Module) -> bool:
    """Return whether a hook of an adapter, or of prompts, is inside an encoder."""
    inside = [m for child in encoder.children() for m in child.modules()]
    hooks = [h for m in inside for h in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
    return any(is_adapter_hook(hook) for hook in hooks)
