"""Tell whether a block's own operations leave its last sum, reshape it, or make other values of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from petune.sites.norms import is_norm
from petune.sites.trace import Addition, Call, Trace

MAX_OPERATIONS = 32
"""Operations between a sum and the output of its block that are looked through."""


def is_reshaped(trace: Trace, y: Tensor, sums: Sequence[Addition]) -> bool:
    """Return whether a tensor is one of some sums, reshaped at most, so that its tokens are in the same order."""
    x = y
    for _ in range(MAX_OPERATIONS):
        if any(add.result is x for add in sums):
            return x.shape[-1] == y.shape[-1]
        if id(x) not in trace.reshaped:
            return False
        x = trace.reshaped[id(x)][1]
    return False


def is_changed(trace: Trace, y: Tensor, sums: Sequence[Addition], block: Call) -> bool:
    """Return whether a block's own operations normalize one of some sums, or take a function of it, to make its output.

    Args:
        trace: The forward.
        y: What the block returns.
        sums: Of its stream and its MLP's output.
        block: The block.
    """
    waiting, seen = [(y, False)], set[tuple[int, bool]]()
    while waiting and len(seen) < MAX_OPERATIONS:
        x, changed = waiting.pop(0)
        if any(add.result is x for add in sums):
            return changed or id(x) in trace.overwritten
        if (id(x), changed) not in seen:
            seen.add((id(x), changed))
            waiting += [(source, changed or by_function) for source, by_function in _sources(trace, x, block)]
    return False


def _sources(trace: Trace, x: Tensor, block: Call) -> Iterator[tuple[Tensor, bool]]:
    """Yield what a tensor was computed from, each with True if it has other values than that, not only scaled ones.

    A product in a block that normalizes something itself may be a norm: a tensor by the root of its mean square.
    """
    if id(x) in trace.reshaped:
        yield trace.reshaped[id(x)][1], False
    if id(x) in trace.functions:
        yield trace.functions[id(x)][1], True
    operands = trace.elementwise.get(id(x), (x, ()))[1]
    is_sum = any(add.result is x for add in trace.additions)
    yield from ((operand, block.normalizes and not is_sum) for operand in operands)
    makers = [c for c in block.inner() if c.output is x and c.input is not x and c.keeps_shape]
    for call in makers:
        if call.input is not None and (_holds_norm(call) or not _computes(call)):
            yield call.input, _holds_norm(call)


def _computes(call: Call) -> bool:
    return any(True for _ in call.module.parameters()) or is_norm(call)


def _holds_norm(call: Call) -> bool:
    """Return whether a module only normalizes by a norm inside, as those do that transpose around BatchNorm."""
    return any(map(is_norm, call.inner())) and not any(c.has_matrix for c in call.subtree())
