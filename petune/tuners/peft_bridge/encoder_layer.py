"""PEFT's layers inside torch's `nn.TransformerEncoderLayer`.

That class reads attributes of its parts that PEFT's layers do not have (`self_attn.batch_first`, `norm1.eps`). In eval
mode, where frozen blocks always are, it runs one fused kernel on the weights that it reads there, without calling
PEFT's layers; it does not if a module inside it has a hook.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from peft.tuners.lora import layer as lora_layer
from torch import nn
from torch.utils.hooks import RemovableHandle

import petune


class ParamWrapper(lora_layer.ParamWrapper):
    """PEFT's layer; attributes that it does not have are the attention's. PEFT knows the class by its name."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the attention, which may get keywords alone."""
        inputs = args or (kwargs.pop("query"),)
        return super().forward(*inputs, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)


def fit_encoder_layers(edit: petune.Edit, layers: Iterable[Any]) -> None:
    """Let torch's encoder layers find the attributes that they read, and call PEFT's layers.

    Args:
        edit: The attachment's edit.
        layers: PEFT's layers that hold the adapter.
    """
    encoder_layers = [m for m in edit.model.modules() if isinstance(m, nn.TransformerEncoderLayer)]
    inside = {m for encoder_layer in encoder_layers for m in encoder_layer.modules()}
    for layer in layers:
        base = layer.get_base_layer()
        if type(layer) is lora_layer.ParamWrapper and isinstance(base, nn.MultiheadAttention):
            layer.__class__ = ParamWrapper
        if isinstance(base, nn.LayerNorm):
            layer.eps = base.eps
        if layer in inside:
            _keep_from_fused_kernel(edit, layer)


def _keep_from_fused_kernel(edit: petune.Edit, layer: nn.Module) -> None:
    """Give a layer a hook for as long as the attachment is enabled."""
    handles: list[RemovableHandle] = []

    def toggle(on: bool) -> None:
        if on:
            handles.append(layer.register_forward_pre_hook(_do_nothing))
        while handles and not on:
            handles.pop().remove()

    toggle(True)
    edit.on_toggle(toggle, layers={})
    edit.on_detach(lambda: toggle(False))


def _do_nothing(module: nn.Module, args: Any) -> None:
    """Do nothing; having a hook keeps the encoder layer from its fused kernel."""
