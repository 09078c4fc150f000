"""PEFT's layer around an attention of torch that holds q, k and v as one parameter.

`nn.TransformerEncoderLayer` reads `batch_first` and other attributes of its attention, which PEFT's layer does not
have. In eval mode it may also run one fused kernel on the weights that it reads there, without calling the layer; it
does not if a module inside it has a hook.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.layer import ParamWrapper
from torch import nn

import petune


class TransparentWrapper(ParamWrapper):
    """PEFT's layer; attributes that it does not have are the attention's."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the attention's, which may be called with keywords alone."""
        inputs = args or (kwargs.pop("query"),)
        return super().forward(*inputs, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)


def wrap_attention(edit: petune.Edit, layer: nn.Module) -> None:
    """Let the owner of an attention see through PEFT's layer, and keep it from reading weights past the layer."""
    if type(layer) is ParamWrapper:
        layer.__class__ = TransparentWrapper
    handles = [layer.register_forward_pre_hook(_do_nothing)]

    def toggle(on: bool) -> None:
        if on:
            handles.append(layer.register_forward_pre_hook(_do_nothing))
        else:
            handles.pop().remove()

    edit.on_toggle(toggle)


def _do_nothing(module: nn.Module, args: Any) -> None:
    """Do nothing; having a hook keeps the owner from its fused kernel."""
