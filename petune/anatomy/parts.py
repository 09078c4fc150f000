"""The parts of one block: attention, MLP, their norms, and the residual stream between them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from petune.anatomy.trace import Call, Trace


@dataclass(eq=False)
class Mlp:
    """An MLP as a pair: what enters `first` enters it, what leaves `last` leaves it."""

    first: Call
    last: Call


def find_mlp(scope: Call, inner: Call | None, after: float, before: float, dim: int) -> Mlp | None:
    """The MLP directly in `scope`, outside `inner` (the branch with the attention), between two times.

    An MLP keeps the shape of its tokens and has two weight matrices or more. Where no call does that, the
    last two matrices in a row, from width D and back to it, are one.
    """
    calls = [c for c in list(scope.subtree())[1:] if c.start > after and c.start < before]
    calls = [c for c in calls if inner is None or not c.within(inner)]
    whole = [c for c in calls if c.keeps_shape and c.stop <= before and _num_matrices(c) >= 2]
    whole = [c for c in whole if not any(c is not o and c.within(o) for o in whole)]
    if whole:
        call = _past_norm(max(whole, key=_num_weights))
        return Mlp(call, call)
    matrices = [c for c in calls if c.has_matrix and c.input is not None and c.input.ndim >= 3]
    return _pair(matrices, dim)


def _pair(matrices: list[Call], dim: int) -> Mlp | None:
    last = next((c for c in reversed(matrices) if c.output is not None and c.output.shape[-1] == dim), None)
    if last is None:
        return None
    entering = [c for c in matrices if c.stop < last.start and c.input is not None and c.input.shape[-1] == dim]
    if not entering:
        return None
    return Mlp(next(c for c in entering if c.input is entering[-1].input), last)


def _past_norm(call: Call) -> Call:
    """Step into wrappers (residual, pre-norm) as long as the MLP itself is one call within them."""
    here = call
    while norm_inside(here) is not None:
        inner = [c for c in here.children if c.keeps_shape and _num_matrices(c) == _num_matrices(call)]
        if len(inner) != 1:
            return call
        here = inner[0]
    return here


def attention_of(unit: Call, scope: Call) -> Call | None:
    """The widest call around the mixing of tokens that is still a branch: its own norm is outside of it."""
    if unit is scope:
        return None
    best = unit
    for call in unit.ancestors():
        if call is scope or not call.keeps_shape or norm_inside(call) is not None:
            break
        best = call
    return best


def norm_inside(call: Call) -> Call | None:
    """A normalisation within `call` that is the first to see what enters `call`."""
    return next((c for c in list(call.subtree())[1:] if is_norm(c) and c.input is call.input), None)


def norm_of(trace: Trace, call: Call, scope: Call, other: Call | None = None) -> Call | None:
    """The normalisation of a branch: before it, inside it at the entrance, or after it.

    Where tensors are rearranged in between (windows), identity is lost and order decides: the nearest norm
    of the block that is not `other`, the norm of the branch before.
    """
    before = trace.maker(call.input)
    if before is not None and is_norm(before) and before.within(scope) and before is not other:
        return before
    inside = norm_inside(call)
    if inside is not None:
        return inside
    norms = [c for c in scope.subtree() if is_norm(c) and not c.within(call) and c is not other]
    norms = [c for c in norms if other is None or c.start > other.start]
    earlier = [c for c in norms if c.stop < call.start]
    return earlier[-1] if earlier else next((c for c in norms if c.start > call.stop), None)


def is_norm(call: Call) -> bool:
    """Whether a call is a leaf that keeps the shape and divides by a guarded deviation (hence its `eps`)."""
    guarded = hasattr(call.module, "eps") or hasattr(call.module, "variance_epsilon")
    same = call.input is not None and call.output is not None and call.input.shape == call.output.shape
    return call.is_leaf and guarded and same and not call.has_matrix


def mid_of(trace: Trace, mlp: Mlp, attention: Call) -> Call | None:
    """The call that the residual stream enters between attention and MLP.

    The stream is the tensor to which a later addition adds: what enters the MLP itself, or what enters the
    norm before it. A tensor that existed before the attention is not between them.
    """
    maker = trace.maker(mlp.first.input)
    candidates = [mlp.first] if maker is None or not is_norm(maker) else [mlp.first, maker]
    for call in candidates:
        if call.start < attention.stop and not attention.within(call) and not call.within(attention):
            continue
        if call.input is None or not _made_after(trace, call.input, attention):
            continue
        if _added_to(trace, call.input, mlp.last.stop) is not None:
            return call
    return None


def span_exit(trace: Trace, mlp: Mlp, mid: Call | None) -> Call | None:
    """In a block that is no module: the call whose output is added to the stream, unscaled."""
    if mid is None or mid.input is None:
        return mlp.last if trace.maker(mlp.last.output) is not None and mid is not None else None
    return trace.maker(_added_to(trace, mid.input, mlp.last.stop))


def _added_to(trace: Trace, stream: Tensor, after: int) -> Tensor | None:
    for add in trace.adds:
        if add.time > after:
            other = add.other(stream)
            if other is not None:
                return other
    return None


def _made_after(trace: Trace, tensor: Tensor, attention: Call) -> bool:
    """Whether `tensor` is new since the attention: nothing was called with it before the attention ended."""
    return not any(tensor is x for c in trace.calls if c.start < attention.stop for x in c.inputs)


def _num_matrices(call: Call) -> int:
    return sum(c.has_matrix for c in call.subtree())


def _num_weights(call: Call) -> int:
    return sum(p.numel() for p in call.module.parameters())
