"""Find the MLP in a module: one call that keeps the shape of its tokens, or its matrices in a row."""

from __future__ import annotations

from collections.abc import Iterable

from petune.sites.layouts import width_of
from petune.sites.matrices import num_matrices, num_weights
from petune.sites.mlp import Mlp
from petune.sites.norms import norm_inside
from petune.sites.stream import mid_of
from petune.sites.trace import Call, Trace


def find_mlp(trace: Trace, scope: Call, attention: Call | None, after: int, before: float, dim: int) -> Mlp | None:
    """Return the MLP in a module.

    An MLP keeps the shape of its tokens and has two weight matrices or more. If no call does that, the last two
    matrices in a row, from width D and back to it, are one.

    Args:
        trace: The forward.
        scope: The module's call.
        attention: The call in `scope` that holds the attention and is left out; None if that is `scope` itself.
        after, before: The MLP starts between these times.
        dim: D.
    """
    calls = [c for c in scope.inner() if after < c.start < before]
    calls = [c for c in calls if attention is None or not c.within(attention)]
    whole = [c for c in calls if c.keeps_shape and c.stop <= before and num_matrices(c) >= 2]
    if attention is None:  # what follows the softmax in the attention itself works on heads, not on tokens
        whole = [c for c in whole if width_of(c) == dim]
    outermost = [c for c in whole if not any(c is not other and c.within(other) for other in whole)]
    if outermost:
        return _choose(trace, [unwrap(trace, c, dim) for c in sorted(outermost, key=num_weights, reverse=True)], after)
    matrices = [c for c in calls if c.has_matrix and c.input is not None and c.holds_tokens(c.input)]
    mlp = mlp_of_matrices(matrices, dim)
    earlier = (c for c in scope.inner() if c.has_matrix and c.start < after)
    if attention is None and mlp is not None and joins(trace, mlp, earlier):
        return None  # a gate on the attention's output, and its projection
    return mlp or (None if attention is None else _widening_mlp(scope, calls, before, dim))


def _choose(trace: Trace, mlps: list[Mlp], after: int) -> Mlp:
    """Return the first MLP that works on single tokens and adds to a stream; else the first that adds, or of all.

    Others may follow before the next attention, such as the convolutions of the next stage. Of those for single tokens
    it is the one for most of them: class tokens may have an MLP of their own (JumboViT).

    Args:
        trace: The forward.
        mlps: All of them, the largest first.
        after: When the attention ended.
    """
    adding = [mlp for mlp in mlps if mid_of(trace, mlp, after) is not None]
    tokenwise = [mlp for mlp in adding if mlp.is_tokenwise]
    return max(tokenwise, key=lambda mlp: _num_values(mlp.first), default=(adding or mlps)[0])


def _num_values(call: Call) -> int:
    return 0 if call.input is None else call.input.numel()


def _widening_mlp(scope: Call, calls: list[Call], before: float, dim: int) -> Mlp | None:
    """Return an MLP that changes the width of its tokens to that of its block's output (torchvision's mvit_v1_b)."""
    y = scope.output
    if scope.parent is None or y is None or y.ndim != 3 or y.shape[-1] == dim:
        return None
    entered = [c for c in calls if c.stop <= before and c.width == dim and num_matrices(c) >= 2]
    whole = [c for c in entered if c.output is not None and c.output.shape == y.shape]
    return Mlp(whole[0], whole[0], int(y.shape[-1])) if whole else None


def joins(trace: Trace, mlp: Mlp, others: Iterable[Call]) -> bool:
    """Return whether the last matrix of an MLP reads some other calls that its first matrix does not read."""
    sources = trace.flow.sources({c.start: c.start for c in others}, [mlp.first.start, mlp.last.start])
    return not sources[mlp.last.start] <= sources[mlp.first.start]


def mlp_of_matrices(matrices: list[Call], dim: int) -> Mlp | None:
    """Return the MLP that the last of some matrices ends, which return to width `dim`; None if they are none."""
    last = next((c for c in reversed(matrices) if c.output is not None and c.output.shape[-1] == dim), None)
    if last is None:
        return None
    hidden = (last.width, 2 * last.width)  # twice if one matrix makes value and gate
    entered = [c for c in matrices if c.stop < last.start and c.width == dim]
    entered = [c for c in entered if c.output is not None and c.output.shape[-1] in hidden and _same_rows(c, last)]
    if not entered:
        return None
    return Mlp(next(c for c in entered if c.input is entered[-1].input), last)


def _same_rows(first: Call, last: Call) -> bool:
    """Return whether what leaves the first matrix has as many tokens as what enters the last."""
    y, x = first.output, last.input
    return y is not None and x is not None and y.numel() // y.shape[-1] == x.numel() // x.shape[-1]


def unwrap(trace: Trace, call: Call, dim: int) -> Mlp:
    """Step into wrappers (residual, pre-norm) as long as the MLP is one call within them, or two matrices."""
    wrapper = call
    while norm_inside(trace, wrapper) is not None or _adds_its_input(trace, wrapper):
        inner = [c for c in wrapper.children if c.keeps_shape and num_matrices(c) == num_matrices(call)]
        if len(inner) != 1:
            matrices = [c for c in wrapper.subtree() if c.has_matrix]
            pair = mlp_of_matrices(matrices, dim) if _adds_its_input(trace, wrapper) else None
            return pair or Mlp(wrapper, wrapper)
        wrapper = inner[0]
    return Mlp(wrapper, wrapper)


def _adds_its_input(trace: Trace, call: Call) -> bool:
    """Return whether all that a call adds inside is its input; a norm may follow (OneFormer's decoder)."""
    inside = {add.operands: add for add in trace.additions if call.start < add.time < call.stop}
    return call.input is not None and len(inside) == 1 and all(add.adds_to(call.input) for add in inside.values())
