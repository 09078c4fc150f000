"""Norms of several modules: one computes without weights, and the module around it scales and shifts the result."""

from __future__ import annotations

from petune.sites.norms import is_norm
from petune.sites.stream import is_residual
from petune.sites.trace import Call, Trace, is_vector


def join_composite_norms(trace: Trace) -> None:
    """Make each norm of several modules one call without calls inside, so that it is a norm like others."""
    for call in [c for c in trace.calls[1:] if _is_composite(trace, c)]:
        inside = {id(c) for c in call.inner()}
        trace.calls[:] = [c for c in trace.calls if id(c) not in inside]
        call.children.clear()
        call.normalizes = True


def _is_composite(trace: Trace, call: Call) -> bool:
    """Return whether a module only normalizes its input, by a norm without weights, and scales and shifts the result.

    Its own weights are one number for each channel. A branch around a norm, with its residual sum, is none.
    """
    leaves = [c for c in call.inner() if c.is_leaf]
    own = [*call.module.parameters()]
    if not leaves or not call.keeps_shape or not own or not all(map(is_vector, own)):
        return False
    norms = [c for c in leaves if is_norm(c)]
    is_bare = len(norms) == 1 and norms[0].input is call.input and next(norms[0].module.parameters(), None) is None
    mixes = any(op.call.within(call) for op in trace.attention_ops)
    return is_bare and not mixes and not is_residual(trace, call) and norms[0].output is not call.output
