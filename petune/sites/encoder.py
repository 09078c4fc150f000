"""Find where the encoder ends: its last block, and the layers after it that still belong to the encoder."""

from __future__ import annotations

from collections.abc import Sequence

from petune.sites.heads_by_library import holds_matrix
from petune.sites.site import Block
from petune.sites.trace import Addition, Call, Trace


def start_of(trace: Trace, blocks: Sequence[Block]) -> int:
    """Return when the first block is entered; 0 without blocks."""
    return min((c.start for c in calls_of(trace, blocks)), default=0)


def end_of(trace: Trace, blocks: Sequence[Block]) -> int:
    """Return when the last block is left; 0 without blocks."""
    return max((c.stop for c in calls_of(trace, blocks)), default=0)


def attends_to_others(block: Call) -> bool:
    """Return whether a block is called with a second row of tokens, as a decoder is with the encoder's."""
    x = block.input
    if x is None or x.ndim != 3:
        return False
    others = [y for y in block.inputs[1:] if y.ndim == 3 and y.shape[-1] == x.shape[-1] and y.is_floating_point()]
    rows = {x.numel(), x.numel() // len(x), x.numel() // x.shape[1]}
    return any(y.numel() not in rows for y in others)


def encoder_of(trace: Trace, blocks: Sequence[Block]) -> set[int]:
    """Return modules that are a part of the encoder wherever they are called.

    These are the modules of the innermost module that calls all blocks, unless that is the model (MobileViT's encoder
    calls convolutions after its last block), and what is called inside a residual connection around blocks (Swin2SR's
    `conv_after_body`). With a decoder, whose blocks may predict something themselves, there are none.
    """
    calls = _entered(trace, blocks)
    last = max(calls, key=lambda c: c.stop, default=None)
    if last is None or any(attends_to_others(c) for c in calls):
        return set()
    around = (c for c in last.ancestors() if all(c.start < other.start and other.stop < c.stop for other in calls))
    encoder = next(around, None)
    parts = [] if encoder is None or encoder is trace.root else [encoder]
    residual = last_residual(trace, blocks)
    if residual is not None:
        parts += [c for c in outermost_after(trace, end_of(trace, blocks)) if c.start < residual.time]
    return {id(m) for part in parts for m in part.module.modules()}


def last_residual(trace: Trace, blocks: Sequence[Block]) -> Addition | None:
    """Return the last addition after the blocks that adds features from before them, or None without one.

    What is added to the features comes from layers that keep the number of values, unlike a decoder's that enlarge the
    image. The image itself is no feature: a head's last layer may add to it what it predicts.
    """
    calls, end = _entered(trace, blocks), end_of(trace, blocks)
    last = max(calls, key=lambda c: c.stop, default=None)
    if last is None or any(attends_to_others(c) for c in calls):
        return None
    after = outermost_after(trace, end)
    changing = [c.start for c in after if not _keeps_size(c)]
    before = min(changing, default=trace.root.stop)
    first = next((c.start for c in after), before)
    sums = [add for add in trace.additions if first < add.time < before]
    return next((add for add in reversed(sums) if _adds_earlier(trace, add, calls, last)), None)


def outermost_after(trace: Trace, time: int) -> list[Call]:
    """Return the calls with a matrix after a time, without those inside another one."""
    after = [c for c in trace.calls if c.start > time and holds_matrix(c.module)]
    return [c for c in after if c.parent is None or c.parent.start <= time]


def _adds_earlier(trace: Trace, add: Addition, blocks: Sequence[Call], last: Call) -> bool:
    """Return whether an addition adds features that the innermost module around it had before its first block."""
    scope = next((c for c in last.ancestors() if add.time < c.stop), trace.root)
    first = min(c.start for c in blocks if c.within(scope))
    image = {id(x) for c in trace.calls if c.start <= _first_matrix(trace) for x in c.inputs}
    early = {id(x) for c in trace.calls if c.start <= first for x in c.inputs}
    early |= {id(c.output) for c in trace.calls if c.stop < first}
    shapes = {x.shape for x in add.operands}
    return len(add.operands) == 2 and len(shapes) == 1 and any(id(x) in early - image for x in add.operands)


def _first_matrix(trace: Trace) -> int:
    return next((c.start for c in trace.calls if c.has_matrix), 0)


def _keeps_size(call: Call) -> bool:
    x, y = call.input, call.output
    return x is not None and y is not None and x.numel() == y.numel()


def calls_of(trace: Trace, blocks: Sequence[Block]) -> list[Call]:
    """Return the calls of the modules that bound blocks."""
    bounds = {id(m) for block in blocks for m in block.modules}
    return [c for c in trace.calls if id(c.module) in bounds]


def _entered(trace: Trace, blocks: Sequence[Block]) -> list[Call]:
    enters = {id(block.enter) for block in blocks}
    return [c for c in trace.calls if id(c.module) in enters]
