"""Find which norm belongs to an attention or to an MLP: the one before it, inside it, or after it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from petune.sites.layouts import is_conv
from petune.sites.norms import is_norm, norms_of_input
from petune.sites.stream import addition_to, forms_of
from petune.sites.trace import Call, Trace


def norm_of(
    trace: Trace, branch: Call, last: Call, calls: Sequence[Call], scope: Call, other: Call | None = None
) -> Call | None:
    """Return the norm of a branch: the one before it, else one at its entrance, else the nearest one.

    Args:
        trace: The forward.
        branch: The attention, or the first call of the MLP.
        last: The call that the branch ends with.
        calls: The calls of the block.
        scope: The module around the block; it may hold the norm before a block that is no module itself.
        other: The norm of the branch before.
    """
    return (
        _norm_by_identity(trace, branch, last, scope, other)
        or _only_norm_inside(trace, branch)
        or _norm_by_order(trace, branch, last, calls, scope, other)
    )


def _norm_by_identity(trace: Trace, branch: Call, last: Call, scope: Call, other: Call | None) -> Call | None:
    """Return the norm whose output is exactly what enters the branch, unless that is the stream (post-norm)."""
    maker = trace.maker(branch.input)
    if maker is None or maker is other or not maker.within(scope) or _makes_stream(trace, maker, last, scope):
        return None
    return maker if is_norm(maker) and not _belongs_to_layer(trace, maker) else None


def _makes_stream(trace: Trace, norm: Call, last: Call, scope: Call) -> bool:
    """Return whether what a branch returns is added to what a norm returns, so that the norm ends the block before."""
    x, y = norm.output, last.output
    if norms_of_input(trace, last):
        return False  # Keel: the branch has a norm of its own, too
    addition = None if y is None else addition_to(trace, y, last.stop, scope.stop)
    return addition is not None and x is not None and any(addition.adds_to(z) for z in forms_of(trace, x))


def _norm_by_order(
    trace: Trace, branch: Call, last: Call, calls: Sequence[Call], scope: Call, other: Call | None
) -> Call | None:
    """Return the last norm before the branch, or else the first after it, where windowing breaks tensor identity."""
    norms = [c for c in calls if is_norm(c) and c is not other and not _belongs_to_layer(trace, c)]
    norms = [c for c in norms if other is None or c.start > other.start]
    earlier = [c for c in norms if c.stop < branch.start]
    later = (c for c in norms if c.start > last.stop and not _opens_branch(trace, c, scope))
    return earlier[-1] if earlier else next(later, None)


def _opens_branch(trace: Trace, norm: Call, scope: Call) -> bool:
    """Return whether something is added to what enters a norm, which thus belongs to the branch after it."""
    x, y = norm.input, norm.output
    addition = None if x is None else addition_to(trace, x, norm.stop, scope.stop)
    if addition is None or y is None:
        return False
    return all(not addition.adds_to(form) for form in forms_of(trace, y))  # an RMSNorm scales its input


def _belongs_to_layer(trace: Trace, norm: Call) -> bool:
    """Return whether a norm normalizes heads, or follows a convolution or, as BatchNorm in LeViT, a linear layer."""
    maker, x = trace.maker(norm.input), norm.input
    per_head = x is not None and any(p.numel() not in (1, x.shape[1], x.shape[-1]) for p in norm.module.parameters())
    is_batch_norm = isinstance(norm.module, nn.modules.batchnorm._BatchNorm)
    return per_head or (maker is not None and maker.has_matrix and (is_batch_norm or is_conv(maker)))


def _only_norm_inside(trace: Trace, call: Call) -> Call | None:
    """Return the norm that gets the input of `call`, if it is the only one (several branches have several)."""
    norms = norms_of_input(trace, call)
    return norms[0] if len(norms) == 1 else None
