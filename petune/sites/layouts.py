"""Widths and layouts of traced tensors, and sites made from traced calls."""

from __future__ import annotations

from torch import Tensor, nn

from petune.sites.site import Layout, Site
from petune.sites.trace import Call, own_weights

IMAGES = (4, 5)
"""Numbers of dimensions of a tensor that is laid out as images or videos, and of the kernel of a convolution on it."""


def is_conv(call: Call) -> bool:
    """Return whether the call's first weight is a convolution kernel, so that channels come second."""
    first = next((c for c in call.subtree() if c.has_matrix), None)
    return first is not None and any(p.ndim in IMAGES for p in own_weights(first.module))


def is_pointwise(module: nn.Module) -> bool:
    """Return whether a module is a 1×1 convolution: one matrix for every pixel."""
    return isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1


def channel_axis(call: Call) -> int | None:
    """Return which axis of the image or video that enters `call` holds the channels: 1, -1, or None if unknown.

    The first weight that meets the tensor decides.
    """
    x = call.input
    assert x is not None
    for leaf in call.subtree():
        y = leaf.input
        weights = own_weights(leaf.module) if leaf.is_leaf else []
        if y is None or not weights:
            continue
        axis = _axis_by_kind(leaf.module, weights) if y.ndim in IMAGES and y.ndim == x.ndim else None
        if axis is not None and y.shape != x.shape and y.shape[axis] != x.shape[axis]:
            axis = None  # after a pooling the channels are as many as before
        axis = axis or _axis_by_width(x, y, leaf.module, max(p.numel() for p in weights)) or _axis_by_strides(x, y)
        if axis is not None:
            return axis
    return None


def _axis_by_kind(module: nn.Module, weights: list[nn.Parameter]) -> int | None:
    """Return the axis that a layer takes channels from: a kernel the second, a matrix or torch's LayerNorm the last."""
    ndim = max(p.ndim for p in weights)
    if ndim in IMAGES:
        return -1 if all(p.shape[-1] == p.numel() > 1 for p in weights if p.ndim in IMAGES) else 1
    if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.GroupNorm):
        return 1
    # a class derived from LayerNorm may move the axes of an image itself
    return -1 if ndim >= 2 or type(module) is nn.LayerNorm else None


def _axis_by_width(x: Tensor, y: Tensor, layer: nn.Module, num_entries: int) -> int | None:
    """Return the axis of x whose size is the width that a layer works on.

    Args:
        x: The (B, ., ., .) tensor in question.
        y: The layer's input: x as it is or cut into windows, or x as tokens (B, N, C), which a Conv1d takes as
            (B, C, N).
        layer: The layer.
        num_entries: Size of the layer's first weight, which for a norm is its width.
    """
    second, last = x.shape[1], x.shape[-1]
    if second == last or (y.ndim != 3 and y.numel() != x.numel()):
        return None
    as_tokens = y.ndim == 3 and y.shape[1] * y.shape[-1] == x.numel() // len(x)
    width = y.shape[1 if isinstance(layer, nn.Conv1d) else -1] if as_tokens else num_entries
    if width not in (second, last):
        return None
    return 1 if width == second else -1


def _axis_by_strides(x: Tensor, y: Tensor) -> int | None:
    """Return the axis of x that is the last one of y, tokens (B, N, C) that are a view of x, as their strides tell.

    This decides where an image has as many rows and columns as channels.
    """
    if y.ndim != 3 or y.shape[-1] == 1 or not share_memory(x, y):
        return None
    axes = [axis for axis in (1, -1) if (x.shape[axis], x.stride(axis)) == (y.shape[-1], y.stride(-1))]
    return axes[0] if len(axes) == 1 else None


def share_memory(x: Tensor, y: Tensor) -> bool:
    """Return True if one tensor is the other, or both are views of one."""
    return x is y or x.untyped_storage()._cdata == y.untyped_storage()._cdata


def width_of(call: Call) -> int:
    """Return the width D of the tokens that enter a call with weights."""
    x = call.input
    assert x is not None
    return int(x.shape[1] if x.ndim in IMAGES and channel_axis(call) == 1 else x.shape[-1])


def width_after(call: Call) -> int:
    """Return the width D of the tokens that leave a call that keeps their layout."""
    x, y = call.input, call.output
    assert x is not None
    assert y is not None
    if y.ndim in IMAGES and x.ndim == y.ndim:
        return int(y.shape[1] if channel_axis(call) == 1 else y.shape[-1])
    return int(y.shape[-1])


def layout_of(call: Call, dim: int, default: Layout = "BHWC") -> Layout:
    """Return the layout of the tokens that enter `call`; `default` if neither weights nor the width `dim` tell."""
    x = call.input
    if x is None or x.ndim not in IMAGES:
        return "BNC"
    axis = channel_axis(call)
    if axis is not None:
        return "BCHW" if axis == 1 else "BHWC"
    is_last, is_second = x.shape[-1] == dim, x.shape[1] == dim
    if is_last == is_second:
        return "BCHW" if default == "BCHW" else "BHWC"
    return "BCHW" if is_second else "BHWC"


def make_site(
    role: str, first: Call, last: Call, dim: int, model: str, default: Layout = "BHWC", *, read_only: bool = False
) -> Site:
    """Return the site from the input of `first` to the output of `last`."""
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
