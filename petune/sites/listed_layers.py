"""Find layers that are lists of several attentions and an MLP, which a loop of the transformer calls one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from petune.sites.attention_span import attention_branch, projection_of
from petune.sites.attentions import Pair, TracedAttention
from petune.sites.branch_norms import norm_of
from petune.sites.branches import described
from petune.sites.containers import child_towards
from petune.sites.last_sum import span_exit
from petune.sites.layouts import layout_of, make_site
from petune.sites.matrices import num_matrices
from petune.sites.site import Block, is_within
from petune.sites.stream import mid_of
from petune.sites.trace import Call, Trace


def find_listed_layers(trace: Trace, attentions: Sequence[TracedAttention]) -> dict[int, tuple[int, Block]]:
    """Return, by identity of each attention in such a layer, when the layer starts, and its block."""
    found: dict[int, tuple[int, Block]] = {}
    for pair, own in _layers(trace, attentions):
        block = _block_of(trace, pair, own)
        if block is not None:
            found |= {id(a): (child_towards(pair.scope, own[0].call).start, block) for a in own}
    return found


def _layers(trace: Trace, attentions: Sequence[TracedAttention]) -> Iterator[tuple[Pair, list[TracedAttention]]]:
    """Yield the last attention with its MLP, and all attentions, of each list that holds attentions before an MLP.

    The MLP may be in a list of its own next to that of the attentions.
    """
    for last in attentions:
        pair = last.pair
        if pair is None or len(pair.inside) < 2:
            continue
        path, path_of_mlp = (_list_of(pair, call) for call in (last.call, pair.mlp.last))
        own = [a for a in pair.inside if is_within(a.call.path, path)]
        is_near = path_of_mlp == path or path_of_mlp.rpartition(".")[0] == path.rpartition(".")[0] != pair.scope.path
        has_mlp_before = any(a.pair is not None and a.pair.mlp.first.start < last.call.start for a in own)
        items = {id(child_towards(pair.scope, a.call)) for a in own}
        if is_near and _is_list(trace, pair, path) and len(items) > 1 and own[-1] is last and not has_mlp_before:
            yield pair, own


def _list_of(pair: Pair, call: Call) -> str:
    return child_towards(pair.scope, call).path.rpartition(".")[0]


def _is_list(trace: Trace, pair: Pair, path: str) -> bool:
    module = trace.root.module.get_submodule(path)
    return path != pair.scope.path and all(c.module is not module for c in trace.calls)


def _block_of(trace: Trace, pair: Pair, attentions: Sequence[TracedAttention]) -> Block | None:
    """Return the block of a layer, from its first attention to its last MLP; None if that is added to no stream.

    Where several MLPs follow, it has no `mid`.
    """
    scope, mlp = pair.scope, pair.mlp
    first = child_towards(scope, attentions[0].call)
    mid = mid_of(trace, mlp, child_towards(scope, attentions[-1].call).stop)
    last = None if mid is None else span_exit(trace, mlp, mid)
    around = [attention_branch(trace, a.call, scope) for a in attentions]
    attns = [branch for branch in around if branch is not None]
    if mid is None or last is None or len(attns) < len(around):
        return None
    further = _further_mlps(trace, pair)
    dim, model = pair.attention.dim, trace.model_name
    site = make_site("block", first, further[-1] if further else last, dim, model)
    of_mid = make_site("mid", mid, mid, dim, model, layout_of(mid, dim), read_only=True)
    bare = Block(**vars(site), index=0, extra_inputs=first.extra_inputs, parts={} if further else {"mid": of_mid})
    branches = [*(("attn", attn, projection_of(trace, attn, scope)) for attn in attns), ("mlp", mlp.first, mlp.last)]
    branches += [("mlp", call, call) for call in further]
    return described(bare, branches, _norms(trace, scope, first, branches))


def _further_mlps(trace: Trace, pair: Pair) -> list[Call]:
    """Return the modules after the MLP in its list that have matrices, and whose output is added."""
    path = _list_of(pair, pair.mlp.last)
    calls = [c for c in pair.scope.children if c.start > pair.mlp.last.stop and is_within(c.path, path)]
    calls = [c for c in calls if num_matrices(c) > 1 and not any(a.call.within(c) for a in pair.inside)]
    return [c for c in calls if any(add.adds_to(c.output) for add in trace.additions)]


def _norms(trace: Trace, scope: Call, first: Call, branches: Sequence[tuple[str, Call, Call]]) -> list[Call | None]:
    """Return the norm of each branch: the one whose output enters it, or one inside that reads what does."""
    norms: list[Call | None] = []
    start = first.start
    for _, enter, leave in branches:
        calls = [c for c in scope.inner() if start <= c.start < enter.start]
        other = next((norm for norm in reversed(norms) if norm is not None), None)
        norm = norm_of(trace, enter, leave, calls, scope, other)
        norms.append(None if norm in norms else norm)
        start = leave.stop
    return norms


def is_transformer(trace: Trace, pair: Pair) -> bool:
    """Return whether attentions in lists of a module follow each other, with several MLPs: it holds several blocks."""
    children = {id(c): c for c in (child_towards(pair.scope, a.call) for a in pair.inside)}
    if any(c.path.rpartition(".")[0] == pair.scope.path for c in children.values()):
        return False
    spans = {c.start: c.start for c in children.values()}
    sources = trace.flow.sources(spans, list(spans))
    follows = [c for c in children.values() if sources.get(c.start, set()) - {c.start}]
    others = [c for c in pair.scope.children if not any(a.call.within(c) for a in pair.inside)]
    return bool(follows) and sum(num_matrices(c) > 1 for c in others) > 1
