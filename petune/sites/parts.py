"""Find the parts of one block: MLP, attention, their norms, and the residual stream between them.

    x ──┬── norm1 ── attention ──(+)─ mid ─┬── norm2 ── MLP ──(+)── y
        └─────────────────────────┘        └───────────────────┘

Tensors are compared by identity: `mid` is the one that enters norm2 and to which the MLP's output is added.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from petune.sites.block_end import is_changed, is_reshaped
from petune.sites.layouts import is_conv, is_pointwise, width_of
from petune.sites.norms import is_norm, norm_inside
from petune.sites.trace import Addition, Call, Trace, own_weights

MAX_OPERATIONS = 16
"""Operations between a norm and an MLP that are looked through."""


@dataclass(eq=False)
class Mlp:
    """An MLP: its input enters `first`, its output leaves `last`.

    Attributes:
        dim: Width of its output, if it returns another one than the attention.
    """

    first: Call
    last: Call
    dim: int | None = None

    @property
    def is_tokenwise(self) -> bool:
        """True if no kernel mixes neighboring tokens, and it is no gate that is computed from all tokens."""
        matrices = [c for c in self._calls() if c.has_matrix]
        return not any(map(_mixes, matrices)) and not _is_gate(self.first, matrices)

    def _calls(self) -> list[Call]:
        """Return the calls from its first to its last one, such as a convolution between two matrices."""
        around = next((c for c in self.first.lineage() if self.last.within(c)), self.first)
        return [c for c in around.subtree() if self.first.start <= c.start and c.stop <= self.last.stop]


def _mixes(call: Call) -> bool:
    """Return whether a layer has a kernel for several tokens."""
    is_row = isinstance(call.module, nn.Conv1d | nn.ConvTranspose1d) and max(call.module.kernel_size) > 1
    return is_row or (is_conv(call) and not is_pointwise(call.module))


def _is_gate(call: Call, matrices: list[Call]) -> bool:
    """Return whether all matrices in a call get one row of numbers for each sample: its tokens, pooled."""
    x, entered = call.input, [c.input for c in matrices]
    if x is None or not entered or holds_one_row(x):
        return False
    return all(y is not None and len(y) == len(x) and holds_one_row(y) for y in entered)


def holds_one_row(x: Tensor) -> bool:
    """Return whether a tensor has one row of numbers for each sample: a single token, or all tokens pooled."""
    return sum(side > 1 for side in x.shape[1:]) <= 1


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
        return _choose(trace, [unwrap(trace, c, dim) for c in sorted(outermost, key=_num_weights, reverse=True)], after)
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


def is_residual(trace: Trace, call: Call) -> bool:
    """Return whether a call adds its input to what it computes."""
    x, y = call.input, call.output
    return x is not None and any(add.result is y and add.adds_to(x) for add in trace.additions)


def _adds_its_input(trace: Trace, call: Call) -> bool:
    """Return whether all that a call adds inside is its input; a norm may follow (OneFormer's decoder)."""
    inside = {add.operands: add for add in trace.additions if call.start < add.time < call.stop}
    return call.input is not None and len(inside) == 1 and all(add.adds_to(call.input) for add in inside.values())


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


def scaled(trace: Trace, stream: Tensor) -> list[Tensor]:
    """Return a tensor after it was only scaled or cast on its way to the addition, by modules or operations."""
    forms = [stream]
    for form in forms:
        scales = [c for c in trace.calls if c.input is form and c.is_leaf and not c.has_matrix and not is_norm(c)]
        found = [c.output for c in scales if c.output is not None and c.keeps_shape]
        found += [product for factor, product in (*trace.casts, *trace.scalings) if factor is form]
        known = {id(x) for x in forms}  # what is scaled in place is its own product
        forms += {id(x): x for x in found if id(x) not in known}.values()
    return forms[1:]


def is_scaled(trace: Trace, mlp: Mlp, block: Call) -> bool:
    """Return whether what an MLP returns is multiplied by numbers before a block adds it; a factor of 0.5 is none."""
    y = mlp.last.output
    if y is None:
        return False
    same = [y]
    for form in same:
        found = [y for x, y in (*trace.casts, *trace.slight_scalings) if x is form]
        same += [y for y in found if not any(y is known for known in same)]
    later = [add for add in trace.additions if mlp.last.stop < add.time < block.stop]
    is_added, is_added_as_it_is = (
        any(add.adds_to(form) for add in later for form in forms) for forms in (scaled(trace, y), same)
    )
    return is_added and not is_added_as_it_is


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


def sums_of(trace: Trace, y: Tensor | None, block: Call) -> list[Addition]:
    """Return the additions in a block that make a tensor, the last first: y = (a + b) + c is made by two."""
    own = [add for add in trace.additions if add.result is y and block.start < add.time < block.stop][:1]
    operands = [x for last in own for x in last.operands if x is not y]
    return [*own, *(add for x in operands for add in sums_of(trace, x, block))]


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


def num_matrices(call: Call) -> int:
    """Count layers with a matrix or kernel, and matrices that a module owns directly (experts, an MLP by F.linear)."""
    return sum(max(1, _num_of_width(c)) if c.has_matrix else _num_bare(c) for c in call.subtree())


def _num_of_width(leaf: Call) -> int:
    """Count the matrices of a layer that map from or to tokens as wide as its input."""
    return sum(p.ndim == 2 and leaf.width in p.shape for p in own_weights(leaf.module))


def _num_bare(call: Call) -> int:
    bare = [] if call.is_leaf else own_weights(call.module)
    return sum(sum(side > 1 for side in p.shape) >= 2 for p in bare)


def _num_weights(call: Call) -> int:
    return sum(p.numel() for p in call.module.parameters())
