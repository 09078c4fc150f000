"""From a trace to blocks: attention is where tokens mix, a block is the smallest call that holds it and an MLP."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from petune.sites.layouts import is_conv, layout_of, site, width_after
from petune.sites.parts import (
    Mlp,
    attention_of,
    find_mlp,
    is_norm,
    late_mid,
    mid_of,
    norm_of,
    parallel_mid,
    reaches,
    span_exit,
)
from petune.sites.site import Block, Site
from petune.sites.trace import Call, Trace


@dataclass(eq=False)
class Unit:
    """One attention: the call that mixes tokens, its block's call, and the MLP that follows it there."""

    call: Call
    mixed: int
    stop: float = math.inf
    strong: bool = False
    holder: Call | None = None
    mlp: Mlp | None = None

    @property
    def dim(self) -> int:
        """Width of the tokens that the attention returns."""
        return width_after(self.call)


def find_blocks(trace: Trace, model: str) -> tuple[Block, ...]:
    """All blocks of a traced model, in order; a block that is called twice is listed once."""
    units = attention_units(trace)
    for unit in units:
        _find_holder(trace, unit)
    blocks: dict[int, tuple[int, Block]] = {}
    for unit in units:
        for start, block in _blocks_of(trace, unit, units, model):
            whole = {"attn", "mid"} <= block.parts.keys() and unit.holder and unit.holder.keeps_shape
            if unit.strong or whole:  # what only pools is a block if it is built like one
                blocks.setdefault(id(block.enter), (start, block))
    ordered = sorted(blocks.values(), key=lambda item: item[0])
    return tuple(replace(block, index=i) for i, (_, block) in enumerate(ordered))


def attention_units(trace: Trace) -> list[Unit]:
    """The innermost calls with weights, from tokens to tokens, around each mixing of tokens; in order."""
    found: dict[int, Unit] = {}
    for op in trace.attention_ops:
        around = [c for c in (op.call, *op.call.ancestors()) if _has_matrix(c) and c is not trace.root]
        call = next((c for c in around if c.maps_tokens), None)
        if call is not None and op.is_over_tokens(call):
            unit = found.setdefault(id(call), Unit(call, op.time))
            unit.mixed, unit.strong = op.time, unit.strong or op.many_queries
    units = sorted(found.values(), key=lambda u: u.call.start)
    for unit, following in itertools.pairwise(units):
        unit.stop = following.call.start
    return units


def _has_matrix(call: Call) -> bool:
    return any(p.ndim >= 2 for p in call.module.parameters())


def _find_holder(trace: Trace, unit: Unit) -> None:
    """Walk outwards to the smallest call that has an MLP after the attention and before the next one."""
    inner: Call | None = None
    for call in (unit.call, *unit.call.ancestors()):
        after = unit.mixed if inner is None else inner.stop
        unit.mlp = find_mlp(trace, call, inner, after, unit.stop, unit.dim)
        if unit.mlp is not None:
            unit.holder = call
            return
        inner = call


def _blocks_of(trace: Trace, unit: Unit, units: list[Unit], model: str) -> list[tuple[int, Block]]:
    holder = unit.holder
    if holder is None:
        return _lone(trace, unit, units, model)
    inside = [u for u in units if u.call.within(holder)]
    if len(inside) == 1 and holder is not trace.root and holder.maps_tokens:
        inside_it = _span(trace, unit, holder, model) if _rearranges(trace, unit, holder) else None
        return [inside_it or (holder.start, _describe(trace, unit, holder, model))]
    if holder.keeps_shape and any(u.holder is not holder for u in inside):
        return [(holder.start, _side_by_side(trace, unit, holder, model))]
    span = _span(trace, unit, holder, model)
    return [span] if span is not None else _lone(trace, unit, units, model)


def _rearranges(trace: Trace, unit: Unit, holder: Call) -> bool:
    """Whether a block ends by arranging its tokens anew: windows that it cut are joined (torchvision's MaxViT).

    What is read between attention and MLP and what leaves the block then hold the tokens in different orders, which
    shapes do not always tell: 64 windows of 64 tokens are an image of 64 × 64. A row of tokens that becomes an image
    keeps its order.
    """
    assert unit.mlp is not None
    mid, y = mid_of(trace, unit.mlp, unit.call.stop, holder.stop), holder.output
    x = None if mid is None else mid.input
    if x is None or y is None or x.numel() != y.numel() or (x.ndim < y.ndim and len(x) == len(y)):
        return False
    sums = [a.result for a in trace.additions if a.time > unit.mlp.last.stop and a.other(x) is not None]
    makers = [c for c in holder.subtree() if c is not holder and c.output is y]
    weighed = any(is_norm(c) or list(c.module.parameters()) for c in makers)
    return bool(sums) and all(s is not y for s in sums) and not weighed


def _side_by_side(trace: Trace, unit: Unit, holder: Call, model: str) -> Block:
    """Several attentions whose outputs are summed, then several MLPs: one stream, read after the attentions."""
    assert unit.mlp is not None
    bare = _bare(holder, holder, unit.dim, model)
    mid = mid_of(trace, unit.mlp, unit.call.stop)
    if not reaches(trace, mid, holder):
        return bare
    return _with_mid(bare, mid, unit, model)


def _lone(trace: Trace, unit: Unit, units: list[Unit], model: str) -> list[tuple[int, Block]]:
    """A block without an MLP that can be told apart: attention and MLP fused, or attention alone."""
    if any(u.holder is not None and u.holder.keeps_shape and unit.call.within(u.holder) for u in units):
        return []
    around = [unit.call, *unit.call.ancestors()]
    alone = [c for c in around if c.keeps_shape and sum(u.call.within(c) for u in units) == 1]
    alone = [c for c in alone if c is not trace.root]
    if not alone:
        return []
    bare = _bare(alone[-1], alone[-1], unit.dim, model)
    mid = parallel_mid(trace, alone[-1]) if _mlp_is_fused(unit, alone[-1]) else None
    return [(alone[-1].start, _with_mid(bare, mid, unit, model))]


def _mlp_is_fused(unit: Unit, block: Call) -> bool:
    """Whether a matrix takes more than the tokens of the attention: the hidden units of an MLP beside it."""
    after = [c for c in block.subtree() if c.start > unit.mixed and c.has_matrix and not is_conv(c)]
    return any(c.width >= 2 * unit.dim for c in after)


def _span(trace: Trace, unit: Unit, holder: Call, model: str) -> tuple[int, Block] | None:
    """A block that is no module of its own: attention and MLP are called from the model's list."""
    assert unit.mlp is not None
    first = _towards(holder, unit.call)
    mid = mid_of(trace, unit.mlp, first.stop)
    last = span_exit(trace, unit.mlp, mid)
    if last is None:
        return None
    bare = _bare(first, last, unit.dim, model)
    return first.start, replace(bare, **_parts(trace, unit, holder, first, model, first.start))


def _describe(trace: Trace, unit: Unit, block: Call, model: str) -> Block:
    inner = _towards(block, unit.call) if unit.call is not block else block
    bare = _bare(block, block, width_after(block), model)
    found = _parts(trace, unit, block, inner, model, block.start)
    parts = found["parts"]
    if "mid" in parts and not _returns_as_many(parts["mid"], block):
        del parts["mid"]  # a part of the tokens (a class token), not the stream that leaves the block
    return replace(bare, **found)


def _returns_as_many(mid: Site, block: Call) -> bool:
    entered = next(c.input for c in block.subtree() if c.module is mid.enter)
    return entered is not None and block.output is not None and entered.numel() == block.output.numel()


def _parts(trace: Trace, unit: Unit, scope: Call, inner: Call, model: str, since: int) -> dict[str, Any]:
    """The inner places as keyword arguments of Block."""
    assert unit.mlp is not None
    dim, default = unit.dim, layout_of(scope, unit.dim)
    attn = attention_of(trace, unit.call, scope)
    own = [c for c in scope.subtree() if c.start >= since]
    norm1 = norm_of(trace, attn, own, scope) if attn is not None else None
    after = unit.mixed if inner is scope else inner.stop
    mid = mid_of(trace, unit.mlp, after, scope.stop) or parallel_mid(trace, scope)
    norm2 = norm_of(trace, unit.mlp.first, own, scope, norm1)
    mid = mid or late_mid(trace, scope, unit.mlp, norm2, after)
    parts = [
        site("attn", attn, attn, dim, model, default),
        site("mlp", unit.mlp.first, unit.mlp.last, dim, model, default),
        site("norm1", norm1, norm1, dim, model, default),
        site("norm2", norm2, norm2, dim, model, default),
        site("mid", mid, mid, width_after(scope) if scope.maps_tokens else dim, model, default, read_only=True),
    ]
    return {
        "parts": {part.role: part for part in parts if part is not None},
        "num_windows": _num_windows(attn, scope),
        "norm_first": norm1 is None or attn is None or norm1.start < attn.start,
        "bias_modules": _biases(attn, scope),
        "extra_inputs": inner.parent.extra_inputs if inner.parent is scope else scope.extra_inputs,
    }


def _num_windows(attn: Call | None, scope: Call) -> int:
    x, y = scope.input, None if attn is None else attn.input
    return 1 if x is None or y is None or len(y) % len(x) else len(y) // len(x)


def _biases(attn: Call | None, scope: Call) -> tuple[nn.Module, ...]:
    """Modules that return something for each pair of the tokens that enter the attention."""
    x = None if attn is None else attn.input
    if x is None or x.ndim != 3:
        return ()
    pairs = (x.shape[1], x.shape[1])
    alone = [c for c in scope.subtree() if c.output is not None and not c.inputs]
    return tuple(dict.fromkeys(c.module for c in alone if c.output is not None and c.output.shape[-2:] == pairs))


def _bare(first: Call, last: Call, dim: int, model: str) -> Block:
    return Block(
        role="block",
        path=first.path,
        enter=first.module,
        exit_path=last.path,
        exit=last.module,
        dim=dim,
        layout=layout_of(first, dim),
        model=model,
        index=0,
        extra_inputs=first.extra_inputs,
    )


def _with_mid(bare: Block, mid: Call | None, unit: Unit, model: str) -> Block:
    found = site("mid", mid, mid, unit.dim, model, bare.layout, read_only=True)
    return bare if found is None else replace(bare, parts={"mid": found})


def _towards(outer: Call, inner: Call) -> Call:
    """The child of `outer` that `inner` happens in, or `inner` itself."""
    here = inner
    while here.parent is not None and here.parent is not outer:
        here = here.parent
    return here
