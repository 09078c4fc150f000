"""Find norms: what is one, and which are the first in a call that get its input."""

from __future__ import annotations

from torch import Tensor, nn

from petune.sites.trace import Call, Trace, is_vector


def is_norm(call: Call) -> bool:
    """Return whether a call is a leaf without a matrix that keeps the shape and normalizes, or has an `eps`.

    So does one that squashes its input and scales the result by channel: Dynamic Tanh (arXiv:2503.10622) and its
    relatives.
    """
    guarded = _has_epsilon(call.module)
    same = call.input is not None and call.output is not None and call.input.shape == call.output.shape
    if not (call.is_leaf and same and (guarded or call.normalizes or _squashes_and_scales(call))):
        return False
    return not call.has_matrix and all(map(is_vector, call.module.parameters()))


def is_norm_module(module: nn.Module) -> bool:
    """Return whether a module looks like a norm, without a call of it: it has an `eps` and scales by vectors."""
    own = [*module.parameters(recurse=False)]
    return _has_epsilon(module) and bool(own) and all(map(is_vector, own))


def _squashes_and_scales(call: Call) -> bool:
    return call.squashes and any(p.numel() == call.width > 1 for p in call.module.parameters(recurse=False))


def _has_epsilon(module: nn.Module) -> bool:
    return hasattr(module, "eps") or hasattr(module, "variance_epsilon")


def has_channels_second(call: Call) -> bool:
    """Return whether a norm gets tokens as (B, D, N), which is the layout of no site (BatchNorm1d in PatchTST)."""
    kinds = nn.modules.batchnorm._NormBase | nn.GroupNorm
    return call.input is not None and call.input.ndim == 3 and isinstance(call.module, kinds)


def norm_inside(trace: Trace, call: Call) -> Call | None:
    """Return a norm inside `call` that is the first to get its input."""
    return next(iter(norms_of_input(trace, call)), None)


def norms_of_input(trace: Trace, call: Call) -> list[Call]:
    """Return the norms inside `call` that get its input, as it is or laid out in other dimensions of the same width."""
    return [c for c in call.inner() if is_norm(c) and c.width == call.width and _is_same(trace, c.input, call.input)]


def _is_same(trace: Trace, x: Tensor | None, source: Tensor | None) -> bool:
    """Return whether a tensor is another one, reshaped at most."""
    while x is not None and x is not source:
        x = trace.reshaped.get(id(x), (x, None))[1]
    return x is not None
