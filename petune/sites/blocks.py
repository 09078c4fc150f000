"""From a trace to blocks: a block is the smallest call that holds an attention and an MLP."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from petune.sites.attention_span import attention_branch, projection_of
from petune.sites.attentions import Pair, TracedAttention, find_attentions
from petune.sites.block_end import is_reshaped
from petune.sites.branch_norms import norm_of
from petune.sites.branches import with_branches
from petune.sites.containers import child_towards, contains_block, is_module
from petune.sites.encoder import attends_to_others
from petune.sites.last_sum import changes_sum, is_scaled, reaches_output, span_exit
from petune.sites.layouts import is_conv, layout_of, make_site, width_after, width_of
from petune.sites.listed_layers import find_listed_layers, is_transformer
from petune.sites.norms import has_channels_second, is_norm
from petune.sites.own_modules import with_own_modules
from petune.sites.site import Block, Site
from petune.sites.split_mlps import with_split_mlps
from petune.sites.stream import late_mid, mid_of, parallel_mid, sums_of
from petune.sites.trace import Call, Trace

Found = tuple[int, Block]
"""When a block starts, and the block."""


def find_blocks(trace: Trace) -> tuple[Block, ...]:
    """Return all blocks of a traced model, in order; a block that is called twice is listed once."""
    attentions = find_attentions(trace)
    listed = find_listed_layers(trace, attentions)
    found_for = [(a, listed.get(id(a)) or _block_of(trace, a, attentions)) for a in attentions]
    every = [(a, found) for a, found in found_for if found is not None]
    kinds = {_kind(block) for attention, (_, block) in every if attention.many_queries}
    blocks: dict[int, Found] = {}
    for attention, found in every:
        is_alike = attention.is_single and _kind(found[1]) in kinds  # the last stage may have a single token left
        if attention.many_queries or is_alike or _is_complete(attention, found[1]):
            blocks.setdefault(id(found[1].enter), found)
    ordered = [block for _, block in sorted(blocks.values(), key=lambda found: found[0])]
    branched = _without_last_attentions([with_branches(trace, block, attentions) for block in ordered])
    described = with_split_mlps(trace, branched)
    return with_own_modules(trace, [replace(block, index=index) for index, block in enumerate(described)])


def _without_last_attentions(blocks: list[Block]) -> list[Block]:
    """Leave out attentions without an MLP after the last block with one, unless such a block is of the same class.

    They follow the encoder, such as one after the final norm, and `layers_outside_blocks` names them.
    """
    whole = [index for index, block in enumerate(blocks) if block.parts]
    kinds = {_kind(blocks[index]) for index in whole}
    return [block for i, block in enumerate(blocks) if not whole or i <= whole[-1] or _kind(block) in kinds]


def _kind(block: Block) -> tuple[type, type]:
    return type(block.enter), type(block.exit)


def _is_complete(attention: TracedAttention, block: Block) -> bool:
    """Return whether a block has an attention and `mid`, so that it counts even if its attention only pools.

    It then keeps the shape of its tokens, or changes their width too, as blocks between two stages do.
    """
    if attention.pair is None or not {"attn", "mid"} <= block.parts.keys():
        return False
    scope = attention.pair.scope
    return scope.keeps_shape or (scope.maps_tokens and width_after(scope) != width_of(scope))


def _block_of(trace: Trace, attention: TracedAttention, attentions: list[TracedAttention]) -> Found | None:
    """Return the block of an attention, by the first shape of `SHAPES` that fits; else the attention alone."""
    if attention.pair is not None:
        for fits, build in SHAPES:
            found = build(trace, attention.pair) if fits(trace, attention.pair) else None
            if found is not None:
                return found
    return _without_mlp(trace, attention, attentions)


def _joins_windows(trace: Trace, pair: Pair) -> bool:
    """Return whether a block ends by rearranging its tokens: it joins the windows that it has cut.

    `mid` and the block's output then hold the tokens in different orders. Shapes do not always show that: 64 windows of
    64 tokens have the shape of an image of 64 × 64. A row of tokens that becomes an image keeps its order.
    """
    if not is_module(trace, pair):
        return False
    mid, y = mid_of(trace, pair.mlp, pair.attention.call.stop, pair.scope.stop), pair.scope.output
    x = None if mid is None else mid.input
    if mid is None or x is None or y is None or x.numel() != y.numel() or (x.ndim < y.ndim and len(x) == len(y)):
        return False
    if x.ndim == 4 and x.shape[1] != x.shape[-1] and y.shape == x.movedim(-1, 1).shape:
        return False  # transformers' VitDet puts the channels second again
    later = [add for add in trace.additions if add.time > pair.mlp.last.stop]
    sums = [add.result for add in later if add.adds_to(x)]
    if any(add.result is s for add in sums_of(trace, y, pair.scope) for s in sums):
        return False  # a further branch, such as a second MLP, is added
    if changes_sum(trace, mid, pair.mlp, pair.scope) or is_reshaped(trace, y, later):
        return False
    makers = [c for c in pair.scope.inner() if c.output is y]
    has_weights = any(is_norm(c) or any(True for _ in c.module.parameters()) for c in makers)
    return bool(sums) and all(s is not y for s in sums) and not has_weights


def _has_parallel_attentions(trace: Trace, pair: Pair) -> bool:
    """Return whether several attentions, and then several MLPs, are summed in one module.

    A module that also holds complete blocks, of which each attention has its own MLP, is a transformer.
    """
    own = (a.pair is not None and a.pair.scope is pair.scope for a in pair.inside)
    nested = all(a.pair is not None for a in pair.inside)
    return pair.scope.keeps_shape and not all(own) and not nested and not is_transformer(trace, pair)


def _build_module(trace: Trace, pair: Pair) -> Found:
    """Build a block that is one module."""
    block = pair.scope
    inner = child_towards(block, pair.attention.call)
    bare = _empty_block(block, block, width_after(block), trace.model_name)
    described = _with_parts(trace, pair, bare, inner, list(block.subtree()))
    if "mid" in described.parts and not _returns_as_many(described.mid, block):
        # a part of the tokens (a class token), not the stream that leaves the block
        parts = {role: site for role, site in described.parts.items() if role != "mid"}
        described = replace(described, parts=parts)
    return block.start, described


def _returns_as_many(mid: Site, block: Call) -> bool:
    entered = next(c.input for c in block.subtree() if c.module is mid.enter)
    return entered is not None and block.output is not None and entered.numel() == block.output.numel()


def _build_span(trace: Trace, pair: Pair) -> Found | None:
    """Build a block that is not a module: the module that calls its attention and MLP contains other parts too."""
    first = child_towards(pair.scope, pair.attention.call)
    mid = mid_of(trace, pair.mlp, first.stop)
    last = None if mid is None else span_exit(trace, pair.mlp, mid)
    if last is None:
        return None
    bare = _empty_block(first, last, pair.attention.dim, trace.model_name)
    calls = [c for c in pair.scope.subtree() if c.start >= first.start]
    return first.start, _with_parts(trace, pair, bare, first, calls)


def _is_listed_with_mlp(trace: Trace, pair: Pair) -> bool:
    """Return whether an attention and an MLP for single tokens are items of one list, (attention, MLP) or longer."""
    children = [child_towards(pair.scope, call) for call in (pair.attention.call, pair.mlp.first, pair.mlp.last)]
    parents = {child.path.rpartition(".")[0] for child in children}
    x, y = pair.mlp.first.input, pair.attention.call.output
    same = x is not None and y is not None and x.shape == y.shape
    return len(parents) == 1 and parents != {pair.scope.path} and pair.mlp.is_tokenwise and same


def _build_listed(trace: Trace, pair: Pair) -> Found:
    """Build a block whose stream is not added to as it is: mixed with other streams, interpolated, normalized.

    It has no `mid`: what is added after the MLP would be changed on its way.
    """
    first, last = (child_towards(pair.scope, call) for call in (pair.attention.call, pair.mlp.last))
    bare = _empty_block(first, last, pair.attention.dim, trace.model_name)
    calls = [c for c in pair.scope.subtree() if first.start <= c.start <= last.stop]
    block = _with_parts(trace, pair, bare, first, calls)
    return first.start, replace(block, parts={role: site for role, site in block.parts.items() if role != "mid"})


def _build_parallel_attentions(trace: Trace, pair: Pair) -> Found:
    """Build a block with several attentions and MLPs: one stream, read after the attentions."""
    bare = _empty_block(pair.scope, pair.scope, width_after(pair.scope), trace.model_name)
    mid = mid_of(trace, pair.mlp, pair.attention.call.stop)
    if mid is None or not reaches_output(trace, mid, pair.mlp, pair.scope):
        return pair.scope.start, bare
    block = replace(_with_mid(bare, mid), scales_mlp=is_scaled(trace, pair.mlp, pair.scope))
    return pair.scope.start, replace(block, changes_sum=changes_sum(trace, mid, pair.mlp, pair.scope))


Predicate = Callable[[Trace, Pair], bool]
Builder = Callable[[Trace, Pair], Found | None]
SHAPES: tuple[tuple[Predicate, Builder], ...] = (
    (_joins_windows, _build_span),  # torchvision's MaxViT; the block ends before the windows are joined
    (contains_block, _build_span),  # a hand-written transformer of depth 1
    (is_module, _build_module),  # vit_base_patch16_224
    (_has_parallel_attentions, _build_parallel_attentions),  # vit_small_patch16_18x2_224
    (lambda trace, pair: True, _build_span),  # tnt_s_patch16_224: a module with another attention as well
    (_is_listed_with_mlp, _build_listed),  # hyper-connections
)
"""Shapes of blocks with an MLP, each with a model of timm that has it, in the order in which they are tried."""


def _without_mlp(trace: Trace, attention: TracedAttention, attentions: list[TracedAttention]) -> Found | None:
    """Build a block without a separate MLP: attention alone (botnet26t_256), or fused with it (vit_base_patch16_xp)."""
    scopes = [a.pair.scope for a in attentions if a.pair is not None]
    if any(scope.keeps_shape and attention.call.within(scope) for scope in scopes):
        return None
    around = [c for c in attention.call.lineage() if c is not trace.root and c.keeps_shape]
    alone = [c for c in around if sum(a.call.within(c) for a in attentions) == 1]
    if not alone or (attends_to_others(attention.call) and not any(_is_added(trace, c) for c in alone)):
        return None  # what other tokens are pooled into, as by open_clip's attentional pooling
    bare = _empty_block(alone[-1], alone[-1], attention.dim, trace.model_name)
    mid = parallel_mid(trace, alone[-1]) if _mlp_is_fused(attention, alone[-1]) else None
    return alone[-1].start, _with_mid(bare, mid)


def _is_added(trace: Trace, call: Call) -> bool:
    """Return whether what leaves a call is a sum, or is added to something."""
    return any(add.result is call.output or add.adds_to(call.output) for add in trace.additions)


def _mlp_is_fused(attention: TracedAttention, block: Call) -> bool:
    """Return whether a matrix takes more than the attention's tokens: the hidden units of an MLP as well."""
    later = [c for c in block.subtree() if c.start > attention.end and c.has_matrix and not is_conv(c)]
    return any(c.width >= 2 * attention.dim for c in later)


def _empty_block(first: Call, last: Call, dim: int, model: str) -> Block:
    """Return a block without sites inside."""
    site = make_site("block", first, last, dim, model)
    return Block(**vars(site), index=0, extra_inputs=first.extra_inputs)


def _with_mid(bare: Block, mid: Call | None) -> Block:
    if mid is None:
        return bare
    return replace(bare, parts={"mid": make_site("mid", mid, mid, bare.dim, bare.model, bare.layout, read_only=True)})


def _with_parts(trace: Trace, pair: Pair, bare: Block, inner: Call, calls: list[Call]) -> Block:
    """Return a block with the sites inside it.

    Args:
        trace: The forward.
        pair: Its attention and MLP.
        bare: The block.
        inner: The child of the scope with the attention, or the scope if that is the attention itself.
        calls: The calls of the block.
    """
    scope, attention, mlp = pair.scope, pair.attention, pair.mlp
    branch = attention_branch(trace, attention.call, scope)
    before_mlp = [c for c in calls if c.start < mlp.first.start]
    projection = None if branch is None else projection_of(trace, branch, scope)
    norm1 = None if branch is None or projection is None else norm_of(trace, branch, projection, before_mlp, scope)
    is_post_norm = norm1 is not None and projection is not None and norm1.start > projection.stop
    of_mlp = calls if bare.is_module or is_post_norm else before_mlp
    of_mlp = [c for c in of_mlp if branch is None or not c.within(branch)]
    norm2 = norm_of(trace, mlp.first, mlp.last, of_mlp, scope, norm1)
    end = attention.end if inner is scope else inner.stop
    mid = (
        mid_of(trace, mlp, end, scope.stop)
        or parallel_mid(trace, scope, mlp)
        or late_mid(trace, scope, mlp, norm2, end)
    )
    dim = attention.dim if projection is None else width_after(projection)
    model, layout = bare.model, layout_of(scope, dim)
    ends = {
        "attn": (branch, projection),
        "mlp": (mlp.first, mlp.last),
        "norm1": (norm1, norm1),
        "norm2": (norm2, norm2),
    }
    widths = {role: width_of(norm) for role, norm in (("norm1", norm1), ("norm2", norm2)) if norm is not None}
    widths["mlp"] = mlp.dim or width_after(mlp.last)
    parts = {
        role: make_site(role, first, last, widths.get(role, dim), model, layout)
        for role, (first, last) in ends.items()
        if first is not None and last is not None and not (is_norm(first) and has_channels_second(first))
    }
    if mid is not None:
        parts["mid"] = make_site("mid", mid, mid, bare.dim, model, layout, read_only=True)
    return replace(
        bare,
        parts=parts,
        num_windows=_num_windows(branch, scope),
        norm_first=not is_post_norm,
        scales_mlp=is_scaled(trace, mlp, scope),
        changes_sum=bare.is_module and mid is not None and changes_sum(trace, mid, mlp, scope),
        bias_modules=_bias_modules(branch, scope),
        extra_inputs=inner.parent.extra_inputs if inner.parent is scope else scope.extra_inputs,
    )


def _num_windows(attention: Call | None, scope: Call) -> int:
    x, y = scope.input, None if attention is None else attention.input
    return 1 if x is None or y is None or len(y) % len(x) else len(y) // len(x)


def _bias_modules(attention: Call | None, scope: Call) -> tuple[nn.Module, ...]:
    """Return modules that output a value for each pair of attention tokens, such as relative position biases."""
    x = None if attention is None else attention.input
    if x is None or x.ndim != 3:
        return ()
    pairs = (x.shape[1], x.shape[1])
    without_input = [c for c in scope.subtree() if c.output is not None and not c.inputs]
    modules = (c.module for c in without_input if c.output is not None and c.output.shape[-2:] == pairs)
    return tuple(dict.fromkeys(modules))
