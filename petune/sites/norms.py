"""Find norms: what is one, and which belongs to an attention or to an MLP."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from petune.sites.layouts import is_conv
from petune.sites.trace import Call, Trace, is_vector


def is_norm(call: Call) -> bool:
    """Return whether a call is a leaf without a matrix that keeps the shape and normalizes, or has an `eps`."""
    guarded = _has_epsilon(call.module)
    same = call.input is not None and call.output is not None and call.input.shape == call.output.shape
    if not (call.is_leaf and same and (guarded or call.normalizes)):
        return False
    return not call.has_matrix and all(map(is_vector, call.module.parameters()))


def is_norm_module(module: nn.Module) -> bool:
    """Return whether a module looks like a norm, without a call of it: it has an `eps` and scales by vectors."""
    own = [*module.parameters(recurse=False)]
    return _has_epsilon(module) and bool(own) and all(map(is_vector, own))


def _has_epsilon(module: nn.Module) -> bool:
    return hasattr(module, "eps") or hasattr(module, "variance_epsilon")


def has_channels_second(call: Call) -> bool:
    """Return whether a norm gets tokens as (B, D, N), which is the layout of no site (BatchNorm1d in PatchTST)."""
    kinds = nn.modules.batchnorm._NormBase | nn.GroupNorm
    return call.input is not None and call.input.ndim == 3 and isinstance(call.module, kinds)


def norm_inside(trace: Trace, call: Call) -> Call | None:
    """Return a norm inside `call` that is the first to get its input."""
    return next(iter(_norms_of_input(trace, call)), None)


def _only_norm_inside(trace: Trace, call: Call) -> Call | None:
    """Return the norm that gets the input of `call`, if it is the only one (several branches have several)."""
    norms = _norms_of_input(trace, call)
    return norms[0] if len(norms) == 1 else None


def _norms_of_input(trace: Trace, call: Call) -> list[Call]:
    """Return the norms inside `call` that get its input, as it is or laid out in other dimensions of the same width."""
    return [c for c in call.inner() if is_norm(c) and c.width == call.width and _is_same(trace, c.input, call.input)]


def _is_same(trace: Trace, x: Tensor | None, source: Tensor | None) -> bool:
    """Return whether a tensor is another one, reshaped at most."""
    while x is not None and x is not source:
        x = trace.reshaped.get(id(x), (x, None))[1]
    return x is not None


def norm_of(trace: Trace, branch: Call, calls: Sequence[Call], scope: Call, other: Call | None = None) -> Call | None:
    """Return the norm of a branch: the one before it, else one at its entrance, else the nearest one.

    Args:
        trace: The forward.
        branch: The attention, or the first call of the MLP.
        calls: The calls of the block.
        scope: The module around the block; it may hold the norm before a block that is no module itself.
        other: The norm of the branch before.
    """
    return (
        _norm_by_identity(trace, branch, scope, other)
        or _only_norm_inside(trace, branch)
        or _norm_by_order(trace, branch, calls, other)
    )


def _norm_by_identity(trace: Trace, branch: Call, scope: Call, other: Call | None) -> Call | None:
    """Return the norm whose output is exactly what enters the branch."""
    maker = trace.maker(branch.input)
    if maker is None or maker is other or not maker.within(scope):
        return None
    return maker if is_norm(maker) and not _belongs_to_layer(trace, maker) else None


def _norm_by_order(trace: Trace, branch: Call, calls: Sequence[Call], other: Call | None) -> Call | None:
    """Return the last norm before the branch, or else the first after it, where windowing breaks tensor identity."""
    norms = [c for c in calls if is_norm(c) and c is not other and not _belongs_to_layer(trace, c)]
    norms = [c for c in norms if not c.within(branch) and (other is None or c.start > other.start)]
    earlier = [c for c in norms if c.stop < branch.start]
    return earlier[-1] if earlier else next((c for c in norms if c.start > branch.stop), None)


def _belongs_to_layer(trace: Trace, norm: Call) -> bool:
    """Return whether a norm normalizes heads, or follows a convolution or, as BatchNorm in LeViT, a linear layer."""
    maker, x = trace.maker(norm.input), norm.input
    per_head = x is not None and any(p.numel() not in (x.shape[1], x.shape[-1]) for p in norm.module.parameters())
    is_batch_norm = isinstance(norm.module, nn.modules.batchnorm._BatchNorm)
    return per_head or (maker is not None and maker.has_matrix and (is_batch_norm or is_conv(maker)))
