"""Widths, layouts, and Sites made from traced calls."""

from __future__ import annotations

from torch import Tensor

from petune.anatomy.trace import Call
from petune.sites import Layout, Site


def is_conv(call: Call) -> bool:
    """Whether the call's first weight is a convolution kernel, so that channels come second."""
    first = next((c for c in call.subtree() if c.has_matrix), None)
    return first is not None and any(p.ndim == 4 for p in first.module.parameters(recurse=False))


def width_of(call: Call) -> int:
    """Token width D of what enters a call with weights."""
    x = call.input
    assert x is not None
    return int(x.shape[1] if x.ndim == 4 and is_conv(call) else x.shape[-1])


def layout_of(call: Call, dim: int, default: Layout = "BHWC") -> Layout:
    """How the tokens that enter `call` are laid out; `default` where D equals the height."""
    x = call.input
    if x is None or x.ndim != 4:
        return "BNC"
    last, second = x.shape[-1] == dim, x.shape[1] == dim
    if last and second:
        return "BCHW" if is_conv(call) or default == "BCHW" else "BHWC"
    return "BCHW" if second else "BHWC"


def site(
    role: str, first: Call | None, last: Call | None, dim: int, model: str, default: Layout, point: bool = False
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
        point=point,
    )


def num_tokens(x: Tensor) -> int:
    """Tokens of one picture in a token tensor of any layout that is not BCHW."""
    return int(x.shape[1] if x.ndim == 3 else x.shape[1] * x.shape[2])
