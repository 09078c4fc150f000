"""Find where an attention begins and ends in its block: without its norm and its residual sum, with its projection.

Some modules hold more than the attention, such as BERT's, whose sum and norm are inside; and some hold less, such as
`self` in BERT and Perceiver, after which another module projects the heads.
"""

from __future__ import annotations

from torch import Tensor

from petune.sites.layouts import is_conv, is_pointwise, width_after, width_of
from petune.sites.matrices import num_matrices
from petune.sites.norms import is_norm, norm_inside
from petune.sites.stream import addition_to, forms_of
from petune.sites.trace import Call, Trace


def attention_branch(trace: Trace, attention: Call, scope: Call) -> Call | None:
    """Return the widest call in `scope` around an attention, without its norm and the residual addition."""
    if attention is scope:
        return None
    branch = attention
    for call in attention.ancestors():
        if call is scope or not call.keeps_shape or _sum_with_input(trace, call) is not None:
            break
        if norm_inside(trace, call) is not None and not _sums_others(trace, call, branch):
            break
        branch = call
    return branch


def projection_of(trace: Trace, branch: Call, scope: Call) -> Call:
    """Return the call that an attention ends with: the last one before its output is added to the stream.

    That is a linear layer after the attention, or one inside it if the attention itself adds its input (ALBERT's). A
    model may not add the output at all; then it is the module that maps the heads back to the width of the stream.
    """
    inside = _sum_with_input(trace, branch)
    if inside is not None:
        return _last_addend(trace, branch, inside) or branch
    if branch.parent is None or not scope.maps_tokens:
        return branch
    after = [c for c in scope.inner() if c.start > branch.stop and _projects(trace, c, branch)]
    if not _is_added(trace, branch.output, branch.stop, scope):
        return next((c for c in after if _is_added(trace, c.output, c.stop, scope)), _of_width(branch, scope))
    return branch


def _of_width(branch: Call, scope: Call) -> Call:
    widths = (width_of(scope), width_after(scope))
    if width_after(branch) in widths or branch.parent is None:
        return branch
    after = (c for c in branch.parent.children if c.input is branch.output and c.maps_tokens)
    return next((c for c in after if width_after(c) in widths), branch)


def _projects(trace: Trace, call: Call, branch: Call) -> bool:
    """Return whether a call maps each token that leaves an attention by one matrix, and adds none of its inputs."""
    if branch.output is None or not call.maps_tokens or num_matrices(call) != 1:
        return False
    reads = any(call.input is form for form in forms_of(trace, branch.output))
    mixes = any(is_conv(c) and not is_pointwise(c.module) for c in call.subtree() if c.has_matrix)
    sums = [add for add in trace.additions if call.start < add.time < call.stop]
    adds = any(add.adds_to(x) for add in sums for x in call.inputs)
    return reads and not mixes and not adds and not any(is_norm(c) for c in call.subtree())


def _is_added(trace: Trace, y: Tensor | None, after: int, scope: Call) -> bool:
    return y is not None and addition_to(trace, y, after, scope.stop) is not None


def _sum_with_input(trace: Trace, call: Call) -> Tensor | None:
    """Return the sum of its input and something else that a call returns, as it is or normalized; None without one."""
    x, y = call.input, call.output
    norm = trace.maker(y)
    if norm is not None and is_norm(norm) and norm.within(call):
        y = norm.input
    if x is None or y is None:
        return None
    forms = forms_of(trace, x)
    sums = [add for add in trace.additions if add.result is y and call.start < add.time < call.stop]
    return y if any(add.adds_to(form) for add in sums for form in forms) else None


def _last_addend(trace: Trace, call: Call, total: Tensor) -> Call | None:
    """Return the last layer with a matrix in a call of which what it returns is added in a sum, perhaps scaled."""
    operands = {id(x) for add in trace.additions if add.result is total for x in add.operands}
    made = ((c, c.output) for c in call.inner() if c.has_matrix and c.output is not None)
    added = [c for c, y in made if any(id(form) in operands for form in forms_of(trace, y))]
    return added[-1] if added else None


def _sums_others(trace: Trace, call: Call, branch: Call) -> bool:
    """Return whether a call holds another attention that reads the same tokens as `branch`."""
    others = (op.call for op in trace.attention_ops if op.call.within(call) and not op.call.within(branch))
    return any(c.input is branch.input for other in others for c in other.lineage() if c is not call)
