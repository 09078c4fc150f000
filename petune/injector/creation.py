"""Create what trains as ordinary tensors, whatever context `attach` is called in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from petune.sites.forward import device_of


@contextlib.contextmanager
def ordinary_tensors(model: nn.Module) -> Iterator[None]:
    """Leave `torch.inference_mode`, whose tensors cannot train; and the meta device, unless the model is there."""
    with contextlib.ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if torch.get_default_device().type == "meta" and device_of(model).type != "meta":
            stack.enter_context(torch.device("cpu"))
        yield
