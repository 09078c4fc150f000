"""The parts of one block: attention, MLP, their norms, and the residual stream between them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from petune.sites.layouts import is_conv, width_of
from petune.sites.trace import Call, Trace


@dataclass(eq=False)
class Mlp:
    """An MLP as a pair: what enters `first` enters it, what leaves `last` leaves it."""

    first: Call
    last: Call


def find_mlp(trace: Trace, scope: Call, inner: Call | None, after: float, before: float, dim: int) -> Mlp | None:
    """The MLP directly in `scope`, outside `inner` (the branch with the attention), between two times.

    An MLP keeps the shape of its tokens and has two weight matrices or more. Where no call does that, the
    last two matrices in a row, from width D and back to it, are one.
    """
    calls = [c for c in list(scope.subtree())[1:] if c.start > after and c.start < before]
    calls = [c for c in calls if inner is None or not c.within(inner)]
    whole = [c for c in calls if c.keeps_shape and c.stop <= before and _num_matrices(c) >= 2]
    if inner is None:  # what follows the softmax in the attention itself works on heads, not on tokens
        whole = [c for c in whole if width_of(c) == dim]
    whole = [c for c in whole if not any(c is not o and c.within(o) for o in whole)]
    if whole:
        return _unwrapped(trace, max(whole, key=_num_weights), dim)
    matrices = [c for c in calls if c.has_matrix and c.input is not None and c.input.ndim >= 3]
    return _pair(matrices, dim)


def _pair(matrices: list[Call], dim: int) -> Mlp | None:
    last = next((c for c in reversed(matrices) if c.output is not None and c.output.shape[-1] == dim), None)
    if last is None:
        return None
    hidden = (last.width, 2 * last.width)  # twice, where one matrix makes value and gate
    entering = [c for c in matrices if c.stop < last.start and c.width == dim]
    entering = [c for c in entering if c.output is not None and c.output.shape[-1] in hidden]
    if not entering:
        return None
    return Mlp(next(c for c in entering if c.input is entering[-1].input), last)


def _unwrapped(trace: Trace, call: Call, dim: int) -> Mlp:
    """Step into wrappers (residual, pre-norm) as long as the MLP itself is one call within them, or a pair."""
    here = call
    while norm_inside(here) is not None or is_residual(trace, here):
        inner = [c for c in here.children if c.keeps_shape and _num_matrices(c) == _num_matrices(call)]
        if len(inner) != 1:
            pair = _pair([c for c in here.subtree() if c.has_matrix], dim) if is_residual(trace, here) else None
            return pair or Mlp(here, here)
        here = inner[0]
    return Mlp(here, here)


def is_residual(trace: Trace, call: Call) -> bool:
    """Whether a call adds what enters it to what it computes."""
    x, y = call.input, call.output
    return x is not None and any(add.result is y and add.other(x) is not None for add in trace.additions)


def attention_of(trace: Trace, unit: Call, scope: Call) -> Call | None:
    """The widest call around the mixing of tokens that is still a branch: its own norm is outside of it."""
    if unit is scope:
        return None
    best = unit
    for call in unit.ancestors():
        if call is scope or not call.keeps_shape or norm_inside(call) is not None or is_residual(trace, call):
            break
        best = call
    return best


def norm_inside(call: Call) -> Call | None:
    """A normalisation within `call` that is the first to see what enters `call`."""
    return next((c for c in list(call.subtree())[1:] if is_norm(c) and c.input is call.input), None)


def norm_of(trace: Trace, call: Call, scope: list[Call], near: Call, other: Call | None = None) -> Call | None:
    """The normalisation of a branch: before it, inside it at the entrance, or after it.

    Where tensors are rearranged in between (windows), identity is lost and order decides: the nearest norm
    of the block that is not `other`, the norm of the branch before.

    Args:
        trace: The forward.
        call: The branch: attention, or the MLP's first call.
        scope: The calls of the block.
        near: The module around it, which also holds the norm before a block that is no module itself.
        other: The norm of the branch before.
    """
    before = trace.maker(call.input)
    if (
        before is not None
        and before.within(near)
        and before is not other
        and is_norm(before)
        and not _in_a_layer(trace, before)
    ):
        return before
    norms = [c for c in scope if is_norm(c) and c is not other and not _in_a_layer(trace, c)]
    inside = norm_inside(call)
    if inside is not None:
        return inside
    norms = [c for c in norms if not c.within(call) and (other is None or c.start > other.start)]
    earlier = [c for c in norms if c.stop < call.start]
    return earlier[-1] if earlier else next((c for c in norms if c.start > call.stop), None)


def _in_a_layer(trace: Trace, norm: Call) -> bool:
    """Whether a norm follows a kernel, or normalises heads: it is then a part of that layer, not of the block."""
    maker, x = trace.maker(norm.input), norm.input
    per_head = x is not None and any(p.numel() not in (x.shape[1], x.shape[-1]) for p in norm.module.parameters())
    return per_head or (maker is not None and maker.has_matrix and is_conv(maker))


def is_norm(call: Call) -> bool:
    """Whether a call is a leaf that keeps the shape and divides by a guarded deviation (hence its `eps`)."""
    guarded = hasattr(call.module, "eps") or hasattr(call.module, "variance_epsilon")
    same = call.input is not None and call.output is not None and call.input.shape == call.output.shape
    return call.is_leaf and guarded and same and not call.has_matrix


def mid_of(trace: Trace, mlp: Mlp, after: int, before: float = math.inf) -> Call | None:
    """The call that the residual stream enters between attention and MLP.

    The stream is the tensor to which a later addition adds: what enters the MLP itself, or what enters the
    norm before it. A tensor that existed before the attention is not between them; one that is added to only
    behind the block (`before`) is another stream (of a reversible block).
    """
    maker = trace.maker(mlp.first.input)
    candidates = [mlp.first] if maker is None or not is_norm(maker) else [mlp.first, maker]
    for call in candidates:
        if call.start < after or call.input is None or not _made_after(trace, call.input, after):
            continue
        forms = [call.input, *_scaled(trace, call.input)]
        if any(_added_to(trace, form, mlp.last.stop, before) is not None for form in forms):
            return call
    return None


def _scaled(trace: Trace, stream: Tensor) -> list[Tensor]:
    """The stream behind modules that only scale it on its way to the addition."""
    scales = [c for c in trace.calls if c.input is stream and c.is_leaf and not c.has_matrix and not is_norm(c)]
    return [c.output for c in scales if c.output is not None and c.keeps_shape]


def parallel_mid(trace: Trace, block: Call) -> Call | None:
    """Where attention and MLP both read the stream that enters the block: the call it enters first."""
    if not is_residual(trace, block):
        return None
    return next((c for c in list(block.subtree())[1:] if c.input is block.input), None)


def late_mid(trace: Trace, block: Call, mlp: Mlp, norm: Call | None, after: int) -> Call | None:
    """The MLP's norm, where the block adds what enters it past attention and MLP together (EdgeNeXt).

    The MLP is then no addition to the stream behind the attention, but what enters its norm is still what it reads.
    """
    added = [add for add in trace.additions if add.result is block.output and add.time > mlp.last.stop]
    past = block.input is not None and any(add.other(block.input) is not None for add in added)
    if norm is None or norm.start < after or not past:
        return None
    return norm if trace.maker(mlp.first.input) is norm else None


def reaches(trace: Trace, mid: Call | None, block: Call) -> bool:
    """Whether the stream at `mid`, with one thing added, is what the block returns."""
    if mid is None or mid.input is None:
        return False
    return any(add.result is block.output and add.other(mid.input) is not None for add in trace.additions)


def span_exit(trace: Trace, mlp: Mlp, mid: Call | None) -> Call | None:
    """In a block that is no module: the call whose output is added to the stream, unscaled.

    A module that is called elsewhere too, as an idle drop path often is, cannot be the end of one block.
    """
    if mid is None or mid.input is None:
        return None
    addend = _added_to(trace, mid.input, mlp.last.stop)
    makers = [c for c in trace.calls if addend is not None and c.output is addend]
    once = [c for c in makers if sum(c.module is o.module for o in trace.calls) == 1]
    return max(once, key=lambda c: c.stop, default=None)


def _added_to(trace: Trace, stream: Tensor, after: int, before: float = math.inf) -> Tensor | None:
    for add in trace.additions:
        if after < add.time < before:
            other = add.other(stream)
            if other is not None:
                return other
    return None


def _made_after(trace: Trace, tensor: Tensor, after: int) -> bool:
    """Whether `tensor` is new since the attention: nothing was called with it before the attention ended."""
    return not any(tensor is x for c in trace.calls if c.start < after for x in c.inputs)


def _num_matrices(call: Call) -> int:
    """Layers with a matrix or kernel, and matrices that calls around other calls own themselves (experts)."""
    return sum(1 if c.has_matrix else _num_bare(c) for c in call.subtree())


def _num_bare(call: Call) -> int:
    bare = [] if call.is_leaf else list(call.module.parameters(recurse=False))
    return sum(sum(side > 1 for side in p.shape) >= 2 for p in bare)


def _num_weights(call: Call) -> int:
    return sum(p.numel() for p in call.module.parameters())
