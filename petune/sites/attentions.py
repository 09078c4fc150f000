"""Find the attentions of a traced model, each with its MLP."""

from __future__ import annotations

import math
from dataclasses import dataclass

from petune.sites.find_mlp import find_mlp
from petune.sites.heads_by_library import holds_matrix
from petune.sites.layouts import width_after
from petune.sites.mlp import Mlp
from petune.sites.stream import mid_of
from petune.sites.trace import Call, Trace


@dataclass(eq=False)
class TracedAttention:
    """The innermost call with weights, from tokens to tokens, around an attention operation.

    Attributes:
        call: That call.
        end: When the attention weights were last applied.
        many_queries, is_single: See `AttentionOp`.
        pair: The attention with its MLP; None if there is no MLP before the next attention.
    """

    call: Call
    end: int
    many_queries: bool = False
    is_single: bool = False
    pair: Pair | None = None

    @property
    def dim(self) -> int:
        """Width of the tokens that it returns."""
        return width_after(self.call)


@dataclass(eq=False)
class Pair:
    """An attention and the MLP after it, or before it where their block has them in that order.

    Attributes:
        attention, mlp: The two.
        scope: The smallest call that holds both.
        inside: All attentions in the scope.
    """

    attention: TracedAttention
    mlp: Mlp
    scope: Call
    inside: list[TracedAttention]


def find_attentions(trace: Trace) -> list[TracedAttention]:
    """Return all attentions of a traced model, in order, each with its MLP if it has one."""
    found: dict[int, TracedAttention] = {}
    for op in trace.attention_ops:
        around = [c for c in op.call.lineage() if holds_matrix(c.module) and c is not trace.root]
        call = next((c for c in around if c.maps_tokens), None)
        if call is not None and op.is_over_tokens(call):
            attention = found.setdefault(id(call), TracedAttention(call, op.time))
            attention.end = op.time
            attention.many_queries = attention.many_queries or op.many_queries
            attention.is_single = attention.is_single or op.is_single
    attentions = sorted(found.values(), key=lambda a: a.call.start)
    over_depth = _over_depth(trace, attentions)
    over_tokens = [a for a in attentions if a not in over_depth]
    for attention in attentions:
        attention.pair = _pair_of(trace, attention, over_tokens if attention in over_tokens else attentions)
    return attentions


def _reads_input(attention: TracedAttention, branch: Call) -> bool:
    """Return whether an attention is one of those in a branch that read what enters it."""
    around = (c for c in attention.call.lineage() if c.within(branch) and c is not branch)
    return any(c.input is branch.input for c in around)


def _pair_of(trace: Trace, attention: TracedAttention, attentions: list[TracedAttention]) -> Pair | None:
    """Walk outwards to the smallest call that has an MLP after the attention and before the next one."""
    inner: Call | None = None
    for call in attention.call.lineage():
        after = attention.end if inner is None else inner.stop
        summed = [] if inner is None else [a for a in attentions if _reads_input(a, inner)]
        others = (a.call.start for a in attentions if a.call.start > attention.call.start and a not in summed)
        next_start = min(others, default=math.inf)
        mlp = find_mlp(trace, call, inner, after, next_start, attention.dim)
        if mlp is not None:
            # else the next block, of convolutions, as after an attention in a ResNet
            is_own = mlp.is_tokenwise or mid_of(trace, mlp, after) is not None
            return Pair(attention, mlp, call, [a for a in attentions if a.call.within(call)]) if is_own else None
        before = None if inner is None else _mlp_before(trace, call, inner, attention)
        if before is not None and [a for a in attentions if a.call.within(call)] == [attention]:
            return Pair(attention, before, call, [attention])
        inner = call
    return None


def _over_depth(trace: Trace, attentions: list[TracedAttention]) -> list[TracedAttention]:
    """Return those by which each token attends alone to what it was in earlier layers (attention residuals).

    After the first layer this is one query and one key.
    """
    inputs = [(a, a.call.input) for a in attentions if not a.many_queries]
    alone = [a for a, x in inputs if x is not None and x.ndim == 3 and x.shape[1] == 1 and len(x) > trace.batch_size]
    return alone if any(not a.is_single for a in alone) else []


def _mlp_before(trace: Trace, block: Call, inner: Call, attention: TracedAttention) -> Mlp | None:
    """Return the MLP in a block whose order is MLP, attention: it adds to the stream before the attention reads that.

    Args:
        trace: The forward.
        block: A call around the attention.
        inner: The call in `block` that holds the attention.
        attention: The only one in the block.
    """
    if not block.keeps_shape or block.parent is None:
        return None
    mlp = find_mlp(trace, block, inner, block.start, inner.start, attention.dim)
    return mlp if mlp is not None and mlp.is_tokenwise and mid_of(trace, mlp, block.start, inner.start) else None
