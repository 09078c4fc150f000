"""PEFT's layer around an attention that holds q, k and v as one bare weight, where its owner looks into it.

`nn.TransformerEncoderLayer` reads `batch_first` and others of its attention, which PEFT's layer does not have; and in
eval mode it may run one fused kernel on the weights it reads there, past the layer. It does not where a module in it
has a hook.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.layer import ParamWrapper
from torch import nn


class SeenThrough(ParamWrapper):
    """PEFT's layer; what it does not have itself is the attention's."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the attention's, which may be called by keyword alone."""
        given = args or (kwargs.pop("query"),)
        return super().forward(*given, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)


def open_up(layer: nn.Module) -> None:
    """Let the owner of `layer` read the attention in it."""
    if type(layer) is ParamWrapper:
        layer.__class__ = SeenThrough


def call_it(module: nn.Module, args: Any) -> None:
    """A hook that does nothing, but for keeping the owner from its fused kernel."""
