"""Keep entries of an added parameter at zero: a change of a part of a layer is a change of all of it with zeros."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from petune.base.errors import AttachError


class ZeroEntries:
    """Entries of one parameter that stay zero, whatever the optimizer.

    Args:
        parameter: A parameter that the tuner has added.
        mask: A boolean tensor of its shape, True for the entries that train.

    Attributes:
        parameter: The parameter.
        count: Number of entries that stay zero.
    """

    def __init__(self, parameter: nn.Parameter, mask: Tensor) -> None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != parameter.shape or not mask.any():
            raise AttachError(
                f"add_parameters was given a mask for a parameter of shape {tuple(parameter.shape)} that is no boolean "
                "tensor of this shape, or has no true entry"
            )
        self.parameter = parameter
        self.mask = mask.to(parameter.device)
        self.count = int((~mask).sum())
        self._version = -1
        self.write()
        self._handle = parameter.register_hook(self._masked)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def write(self) -> None:
        """Set the entries to zero if the values have changed."""
        if self.parameter._version != self._version and not self.parameter.is_meta:
            self.mask = self.mask.to(self.parameter.device)
            self.parameter.masked_fill_(~self.mask, 0)
            self._version = self.parameter._version

    def before_forward(self, module: nn.Module, args: Any) -> None:
        """Set the entries to zero; pre-hook of the model."""
        if not torch.compiler.is_compiling():  # gradients are zero there too
            self.write()

    def remove(self) -> None:
        """Let all entries train."""
        self._handle.remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> ZeroEntries:
        return ZeroEntries(copy.deepcopy(self.parameter, memo), self.mask.clone())

    def _masked(self, gradient: Tensor) -> Tensor:
        return gradient * self.mask.to(gradient.device)
