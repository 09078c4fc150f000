"""Widths, layouts, and Sites made from traced calls."""

from __future__ import annotations

from torch import nn

from petune.sites.site import Layout, Site
from petune.sites.trace import Call


def is_conv(call: Call) -> bool:
    """Whether the call's first weight is a convolution kernel, so that channels come second."""
    first = next((c for c in call.subtree() if c.has_matrix), None)
    return first is not None and any(p.ndim == 4 for p in first.module.parameters(recurse=False))


def channel_axis(call: Call) -> int | None:
    """Which axis of the (B, ., ., .) tensor that enters `call` holds the channels: 1, -1, or None if nothing tells.

    The first weight that meets the tensor tells: a kernel wants channels second, a matrix and torch's LayerNorm want
    them last, and another norm has as many entries as there are channels.
    """
    x = call.input
    assert x is not None
    for inner in call.subtree():
        y = inner.input
        own = list(inner.module.parameters(recurse=False)) if inner.is_leaf else []
        if y is None or not own:
            continue
        if y.ndim == 4 and y.shape == x.shape:
            if max(p.ndim for p in own) >= 2:
                return 1 if max(p.ndim for p in own) == 4 else -1
            if type(inner.module) is nn.LayerNorm:  # some derived from it turn an image round themselves
                return -1
        width = y.shape[-1] if y.ndim == 3 and y.shape[1] == x.numel() // len(x) // y.shape[-1] else own[0].numel()
        same = y.ndim == 3 or y.numel() == x.numel()  # the tensor itself, or cut into windows
        if same and x.shape[1] != x.shape[-1] and width in (x.shape[1], x.shape[-1]):
            return 1 if width == x.shape[1] else -1
    return None


def width_of(call: Call) -> int:
    """Token width D of what enters a call with weights."""
    x = call.input
    assert x is not None
    return int(x.shape[1] if x.ndim == 4 and channel_axis(call) == 1 else x.shape[-1])


def width_after(call: Call) -> int:
    """Token width D of what leaves a call that keeps the layout of its tokens."""
    x, y = call.input, call.output
    assert x is not None
    assert y is not None
    if y.ndim == 4 and x.ndim == 4:
        return int(y.shape[1] if channel_axis(call) == 1 else y.shape[-1])
    return int(y.shape[-1])


def layout_of(call: Call, dim: int, default: Layout = "BHWC") -> Layout:
    """How the tokens that enter `call` are laid out; `default` where nothing tells."""
    x = call.input
    if x is None or x.ndim != 4:
        return "BNC"
    axis = channel_axis(call)
    if axis is None:
        last, second = x.shape[-1] == dim, x.shape[1] == dim
        axis = (1 if default == "BCHW" else -1) if last == second else 1 if second else -1
    return "BCHW" if axis == 1 else "BHWC"


def site(
    role: str, first: Call | None, last: Call | None, dim: int, model: str, default: Layout, read_only: bool = False
) -> Site | None:
    """The Site from the input of `first` to the output of `last`; None if either is missing."""
    if first is None or last is None:
        return None
    return Site(
        role=role,
        path=first.path,
        enter=first.module,
        exit_path=last.path,
        exit=last.module,
        dim=dim,
        layout=layout_of(first, dim, default),
        model=model,
        read_only=read_only,
    )


def is_pointwise(module: nn.Module) -> bool:
    """Return whether a module is a 1×1 convolution: one matrix for every pixel."""
    return isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1
