"""Follow the residual stream through a block: what is added to it, and where it is read between attention and MLP.

    x ──┬── norm1 ── attention ──(+)─ mid ─┬── norm2 ── MLP ──(+)── y
        └─────────────────────────┘        └───────────────────┘

Tensors are compared by identity: `mid` is the one that enters norm2 and to which the MLP's output is added.
"""

from __future__ import annotations

import math

from torch import Tensor

from petune.sites.block_end import is_reshaped
from petune.sites.matrices import num_matrices
from petune.sites.mlp import Mlp
from petune.sites.norms import is_norm
from petune.sites.trace import Addition, Call, Trace

MAX_OPERATIONS = 16
"""Operations between a norm and an MLP that are looked through."""


def norms_before(trace: Trace, call: Call) -> list[Call]:
    """Return the norms whose output enters a call, as it is or after it was cast, scaled and shifted (DiT's adaLN)."""
    tensors, found = [call.input], []
    for tensor in tensors:
        maker = trace.maker(tensor)
        if maker is not None and is_norm(maker):
            found.append(maker)
        elif maker is None and tensor is not None and len(tensors) < MAX_OPERATIONS:
            tensors += trace.elementwise.get(id(tensor), (tensor, ()))[1]
    return found


def _used_before(trace: Trace, tensor: Tensor, time: int) -> bool:
    return any(tensor is x for c in trace.calls if c.start < time for x in c.inputs)


def mid_of(trace: Trace, mlp: Mlp, attention_end: int, block_end: float = math.inf) -> Call | None:
    """Return the call that `mid` enters: the norm before the MLP, another module there, or the MLP itself (see above).

    The stream is the tensor that a later addition adds to. A tensor that was used before the attention ended is not
    between attention and MLP. One that is added to only after the block is the other stream of a reversible block.
    """
    maker = trace.maker(mlp.first.input)  # such as a norm that transposes around BatchNorm
    others = [maker] if maker is not None and maker.keeps_shape and not num_matrices(maker) else []
    for call in (mlp.first, *norms_before(trace, mlp.first), *others):
        stream = call.input
        if stream is None or call.start < attention_end or _used_before(trace, stream, attention_end):
            continue
        if addition_to(trace, stream, mlp.last.stop, block_end) is not None:
            return call
    return None


def parallel_mid(trace: Trace, block: Call, mlp: Mlp | None = None) -> Call | None:
    """Return the call that the block's input enters first, if attention and MLP both read that (ParallelScaling).

    The block returns the sum of its input and both outputs, and nothing in it reads a part of that sum.
    """
    x = block.input
    sums = sums_of(trace, block.output, block)
    if x is None or not any(add.adds_to(x) for add in sums):
        return None
    parts = [add.result for add in sums if add.result is not block.output]
    if any(part is y for part in parts for c in block.inner() for y in c.inputs):
        return None
    if mlp is not None and not any(c is not None and c.input is x for c in (mlp.first, trace.maker(mlp.first.input))):
        return None
    return next((c for c in block.inner() if c.input is x), None)


def late_mid(trace: Trace, block: Call, mlp: Mlp, norm: Call | None, attention_end: int) -> Call | None:
    """Return the MLP's norm, if one skip connection spans attention and MLP together (edgenext_xx_small).

    The MLP's output is then not added to the stream after the attention, but the norm's input is still what it reads.
    That is a sum: x + mlp(norm(attn(x))) has no stream between the two.
    """
    additions = [add for add in trace.additions if add.result is block.output and add.time > mlp.last.stop]
    adds_input = block.input is not None and any(add.adds_to(block.input) for add in additions)
    if norm is None or norm.input is None or norm.start < attention_end or not adds_input:
        return None
    is_sum = is_reshaped(trace, norm.input, trace.additions)
    return norm if is_sum and trace.maker(mlp.first.input) is norm else None


def scaled(trace: Trace, stream: Tensor) -> list[Tensor]:
    """Return a tensor after it was only scaled or cast on its way to the addition, by modules or operations."""
    forms = [stream]
    for form in forms:
        scales = [c for c in trace.calls if c.input is form and c.is_leaf and not c.has_matrix and not is_norm(c)]
        found = [c.output for c in scales if c.output is not None and c.keeps_shape]
        found += [cast for x, cast in trace.casts if x is form]
        found += [scaling.product for scaling in trace.scalings if scaling.tensor is form]
        known = {id(x) for x in forms}  # what is scaled in place is its own product
        forms += {id(x): x for x in found if id(x) not in known}.values()
    return forms[1:]


def forms_of(trace: Trace, stream: Tensor) -> list[Tensor]:
    """Return a tensor, and what it was only scaled or cast to."""
    return [stream, *scaled(trace, stream)]


def addition_to(trace: Trace, stream: Tensor, after: int, before: float = math.inf) -> Addition | None:
    """Return what first adds to the stream, or to the stream after scaling, between two times."""
    forms = forms_of(trace, stream)
    additions = (add for form in forms for add in _additions(trace, form, after, before))
    return next(additions, None)


def _additions(trace: Trace, stream: Tensor, after: int, before: float = math.inf) -> list[Addition]:
    return [add for add in trace.additions if after < add.time < before and add.adds_to(stream)]


def sums_of(trace: Trace, y: Tensor | None, block: Call) -> list[Addition]:
    """Return the additions in a block that make a tensor, the last first: y = (a + b) + c is made by two."""
    own = [add for add in trace.additions if add.result is y and block.start < add.time < block.stop][:1]
    operands = [x for last in own for x in last.operands if x is not y]
    return [*own, *(add for x in operands for add in sums_of(trace, x, block))]


def is_residual(trace: Trace, call: Call) -> bool:
    """Return whether a call adds its input to what it computes."""
    x, y = call.input, call.output
    return x is not None and any(add.result is y and add.adds_to(x) for add in trace.additions)
