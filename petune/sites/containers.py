"""Tell a module that is a block from a module that contains one block and more, as a transformer of depth 1 does."""

from __future__ import annotations

from torch import Tensor

from petune.sites.attentions import Pair
from petune.sites.norms import is_norm, norm_inside
from petune.sites.site import is_within
from petune.sites.stream import addition_to, mid_of
from petune.sites.trace import Addition, Call, Trace


def is_module(trace: Trace, pair: Pair) -> bool:
    """Return whether one module maps tokens and has exactly one attention and its MLP."""
    return len(pair.inside) == 1 and pair.scope is not trace.root and pair.scope.maps_tokens


def contains_block(trace: Trace, pair: Pair) -> bool:
    """Return whether a module calls layers before or after its only block: a final norm, a projection.

    Layers after the block take what the MLP's output was added to. The norm at the end of a post-norm block belongs to
    the block; such a block has no norm that reads the stream before the MLP. A further branch that is added to the
    stream (a second MLP, the convolutions of transformers' VitDet) belongs to the block too, unless attention and MLP
    are items of a list, as they are where a loop calls them, and the branch is none.
    """
    if not is_module(trace, pair):
        return False
    mid = mid_of(trace, pair.mlp, child_towards(pair.scope, pair.attention.call).stop)
    last = (
        None if mid is None or mid.input is None else addition_to(trace, mid.input, pair.mlp.last.stop, pair.scope.stop)
    )
    if mid is None or last is None:
        return False
    is_listed = _is_listed(pair)
    if is_listed and _starts_inside(trace, pair, mid):
        return True
    end = _end_of_stream(trace, pair, last)
    after = [c for c in pair.scope.inner() if c.start > end]
    norms = [c for c in after if is_norm(c)]
    num_own = 0 if is_norm(mid) or norm_inside(trace, mid) is not None else 1
    if _is_one_of_several(trace, pair.scope) and not any(c.has_matrix for c in after):
        return False
    return len(norms) > num_own or any(c.has_matrix for c in after)


def _is_one_of_several(trace: Trace, scope: Call) -> bool:
    """Return whether a module is an item of a list of several of its class, as blocks with a last norm (Conformer)."""
    parent, _, name = scope.path.rpartition(".")
    items = {c.path: type(c.module) for c in trace.calls if c.path.rpartition(".")[0] == parent}
    return name.isdigit() and list(items.values()).count(type(scope.module)) > 1


def child_towards(outer: Call, inner: Call) -> Call:
    """Return the child call of `outer` that contains `inner`; if `inner` is `outer`, return it."""
    call = inner
    while call is not outer and call.parent is not None and call.parent is not outer:
        call = call.parent
    return call


def _is_listed(pair: Pair) -> bool:
    """Return whether attention and MLP are in lists, and not modules of the scope itself."""
    children = [child_towards(pair.scope, call) for call in (pair.attention.call, pair.mlp.first)]
    return all(child.path.rpartition(".")[0] != pair.scope.path for child in children)


def _starts_inside(trace: Trace, pair: Pair, mid: Call) -> bool:
    """Return whether the stream that the attention's output is added to is not the module's input."""
    attention = child_towards(pair.scope, pair.attention.call)
    early = {id(x) for c in pair.scope.subtree() if c.start <= attention.start for x in c.inputs}
    sums = [add for add in trace.additions if attention.stop < add.time < mid.start]
    streams = [id(x) for add in sums for x in add.operands if id(x) in early]
    inputs = [id(x) for x in pair.scope.inputs]
    return bool(streams) and not any(stream in inputs for stream in streams)


def _end_of_stream(trace: Trace, pair: Pair, last: Addition) -> int:
    """Return the time of the last addition to the stream in a block, of which `last` is one.

    The stream may be rearranged in between: VitDet's block adds the branch of a convolution to an image.
    """
    stop = max(last.time, _end_of_list(pair))
    for add in trace.additions:
        if last.time < add.time <= stop and any(_is_stream(pair.scope, x, last, add) for x in add.operands):
            last = add
    return last.time


def _end_of_list(pair: Pair) -> int:
    """Return when the first call after the list of attention and MLP begins; without one, when the scope ends."""
    children = [child_towards(pair.scope, call) for call in (pair.attention.call, pair.mlp.first)]
    parents = {child.path.rpartition(".")[0] for child in children}
    if len(parents) > 1 or parents == {pair.scope.path}:
        return pair.scope.stop
    items = [c for c in pair.scope.children if is_within(c.path, *parents)]
    later = [c.start for c in pair.scope.children if c.start > items[-1].stop]
    return min(later, default=pair.scope.stop)


def _is_stream(scope: Call, x: Tensor, last: Addition, add: Addition) -> bool:
    """Return whether an operand is the stream after `last`, also normalized or rearranged, and a branch reads it."""
    if x is last.result:
        return True
    calls = [c for c in scope.inner() if last.time < c.start < add.time]
    is_read = any(c.input is x for c in calls)
    makers = [c for c in calls if c.output is x and next(c.module.parameters(), None) is not None]
    if makers:  # post-norm: the sum is normalized before the next branch
        return is_read and any(is_norm(c) and c.input is last.result for c in makers)
    return is_read and x.numel() == last.result.numel()
