"""Tell what a block makes of its last sum, of the stream and the MLP's output, before it returns."""

from __future__ import annotations

from torch import Tensor

from petune.sites.block_end import is_changed, is_reshaped
from petune.sites.matrices import num_matrices
from petune.sites.mlp import Mlp
from petune.sites.norms import is_norm
from petune.sites.stream import addition_to, forms_of, scaled
from petune.sites.trace import Addition, Call, Trace


def is_scaled(trace: Trace, mlp: Mlp, block: Call) -> bool:
    """Return whether what an MLP returns is multiplied by numbers before a block adds it; a factor of 0.5 is none."""
    y = mlp.last.output
    if y is None:
        return False
    same = [y]
    for form in same:
        found = [cast for x, cast in trace.casts if x is form]
        found += [scaling.product for scaling in trace.scalings if scaling.tensor is form and scaling.is_slight]
        same += [y for y in found if not any(y is known for known in same)]
    later = [add for add in trace.additions if mlp.last.stop < add.time < block.stop]
    is_added, is_added_as_it_is = (
        any(add.adds_to(form) for add in later for form in forms) for forms in (scaled(trace, y), same)
    )
    return is_added and not is_added_as_it_is


def reaches_output(trace: Trace, mid: Call, mlp: Mlp, block: Call) -> bool:
    """Return whether the stream at `mid`, with one thing added, only leaves the block: reshaped at most, or changed."""
    y = block.output
    later = [add for add in trace.additions if mlp.last.stop < add.time < block.stop]
    sums = [add for add in later if add.adds_to(mid.input)]
    if y is None or not sums:
        return False
    norm = _last_norm(trace, block)
    if changes_sum(trace, mid, mlp, block):
        made: int | None = sums[0].time if norm is None else norm.start
    else:
        made = next((time for add in sums if (time := _joins(trace, add, y, block)) is not None), None)
    if made is None:
        return False
    reads = any(any(x is y for x in c.inputs) for c in block.inner() if c.start > made)  # a further branch, as in SAM
    return not reads and not any(add.adds_to(y) for add in later if add.time > made)


def _joins(trace: Trace, add: Addition, y: Tensor, block: Call) -> int | None:
    """Return when a sum becomes the block's output, after further additions to what nothing in the block reads."""
    while not is_reshaped(trace, y, [add]):
        following = (s for s in trace.additions if add.time < s.time < block.stop and s.adds_to(add.result))
        later = next(following, None)
        if later is None or any(add.result is x for c in block.inner() for x in c.inputs):
            return None
        add = later
    return add.time


def changes_sum(trace: Trace, mid: Call, mlp: Mlp, block: Call) -> bool:
    """Return whether a block changes the sum of stream and MLP's output: by a norm (post-norm) or a further MLP.

    What is added to the block's output is then not in what it returns for the sum.
    """
    norm, stream = _last_norm(trace, block), mid.input
    if stream is None:
        return False
    forms = forms_of(trace, stream)
    later = [add for add in trace.additions if mlp.last.stop < add.time < block.stop]
    sums = [add for add in later if any(add.adds_to(form) for form in forms)]
    if sums and _is_read_by_mlp(trace, sums[0], block):
        return True
    if norm is None:
        return block.output is not None and is_changed(trace, block.output, sums, block)
    if any(add.result is norm.input or _comes_next(trace, add, norm) for add in sums):  # DFine clamps the sum
        return True
    # a further branch follows, of whose sum the same is true
    norms = [c for c in block.inner() if is_norm(c) and c.start < norm.start and c.start > mlp.last.stop]
    alone = [add for add in sums if not any(s.adds_to(add.result) for s in later)]
    return any(add.result is c.input and trace.maker(norm.input) is None for add in alone for c in norms)


def _is_read_by_mlp(trace: Trace, add: Addition, block: Call) -> bool:
    """Return whether a further MLP in the block reads a sum, or its norm, and adds to it."""
    read = [add.result, *(c.output for c in block.inner() if is_norm(c) and c.input is add.result)]
    calls = (c for c in block.inner() if c.start > add.time and num_matrices(c) >= 2 and c.keeps_shape)
    reading = (c for c in calls if any(c.input is x for x in read))
    return any(addition_to(trace, add.result, c.stop, block.stop) is not None for c in reading)


def _last_norm(trace: Trace, block: Call) -> Call | None:
    norm = trace.maker(block.output)
    return norm if norm is not None and is_norm(norm) and norm.within(block) else None


def _comes_next(trace: Trace, add: Addition, call: Call) -> bool:
    """Return whether a call follows an addition with no other call or addition between, on a tensor of that shape."""
    times = [*(c.start for c in trace.calls), *(other.time for other in trace.additions)]
    same = call.input is not None and call.input.shape == add.result.shape
    return same and trace.maker(call.input) is None and not any(add.time < time < call.start for time in times)


def span_exit(trace: Trace, mlp: Mlp, mid: Call) -> Call | None:
    """Return the call whose output is added directly to the stream: a block that is not one module ends there.

    A module that is called elsewhere too, as an idle drop path often is, cannot be the end of one block. Neither can a
    module with matrices after the MLP: its own branch is added, as that of a cross-attention between the two.
    """
    stream = mid.input
    addition = None if stream is None else addition_to(trace, stream, mlp.last.stop)
    if stream is None or addition is None:
        return None
    forms = forms_of(trace, stream)
    addends = [x for x in addition.operands if not any(x is form for form in forms)]
    makers = [c for c in trace.calls if any(c.output is x for x in addends)]
    once = [c for c in makers if sum(c.module is other.module for other in trace.calls) == 1]
    own = [c for c in once if c.start < mlp.last.stop or not num_matrices(c)]
    return max(own, key=lambda c: c.stop, default=None)
