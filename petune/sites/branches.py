"""Find all attentions and MLPs of a block with more than one of each: decoders, macaron blocks, parallel branches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from petune.sites.attention_span import attention_branch, projection_of
from petune.sites.attentions import TracedAttention
from petune.sites.branch_norms import norm_of
from petune.sites.find_mlp import joins, mlp_of_matrices, unwrap
from petune.sites.layouts import layout_of, make_site, width_after
from petune.sites.matrices import num_matrices
from petune.sites.mlp import Mlp
from petune.sites.norms import has_channels_second
from petune.sites.site import Block, Site
from petune.sites.stream import norms_before, sums_of
from petune.sites.trace import Call, Trace

Branch = tuple[str, Call, Call]
"""The role, and the calls that enter and leave an attention or an MLP."""


def with_branches(trace: Trace, block: Block, attentions: Sequence[TracedAttention]) -> Block:
    """Return a block with all its attentions and MLPs, and their norms."""
    call = next(c for c in trace.calls if c.module is block.enter)
    inside = [a for a in attentions if a.call.within(call)]
    around = dict.fromkeys(attention_branch(trace, a.call, call) for a in inside)
    attns = [branch for branch in around if branch is not None]
    if not block.is_module or len(attns) < len(around):
        return block
    mlps = _mlps_of(trace, call, attns, inside)
    known = block.parts.get("mlp")
    is_usual = len(attns) < 2 and len(mlps) < 2
    if is_usual or not mlps or (known is not None and all(known.enter is not mlp.first.module for mlp in mlps)):
        return block
    branches = [("attn", attn, projection_of(trace, attn, call)) for attn in attns]
    branches += [("mlp", mlp.first, mlp.last) for mlp in mlps]
    branches.sort(key=lambda branch: branch[1].start)
    norms = _norms_of(trace, call, branches)
    return described(block, branches, norms)


def described(block: Block, branches: Sequence[Branch], norms: Sequence[Call | None]) -> Block:
    """Return a block with its branches and the norm of each; a role that it has once is one of its parts."""
    sites = [_site(block, role, first, last) for role, first, last in branches]
    of_norms = [
        None
        if norm is None or has_channels_second(norm)
        else _site(block, "norm1" if site.role == "attn" else "norm2", norm, norm)
        for site, norm in zip(sites, norms, strict=True)
    ]
    parts = dict(block.parts)
    for site, norm in zip(sites, of_norms, strict=True):
        if sum(other.role == site.role for other in sites) == 1:
            parts.setdefault(site.role, site)
            if norm is not None:
                parts.setdefault(norm.role, norm)
    own = {id(site.enter): site for role, site in parts.items() if role != "mid"}
    return replace(
        block,
        parts=parts,
        branches=tuple(own.get(id(site.enter), site) for site in sites),
        norm_first=all(
            norm is None or norm.start < last.stop for (_, _, last), norm in zip(branches, norms, strict=True)
        ),
        norms=tuple(own.get(id(norm.enter), norm) for norm in of_norms if norm is not None),
    )


def _site(block: Block, role: str, first: Call, last: Call) -> Site:
    dim = width_after(last)
    return make_site(role, first, last, dim, block.model, layout_of(first, dim, block.layout))


def _mlps_of(trace: Trace, block: Call, attns: Sequence[Call], inside: Sequence[TracedAttention]) -> list[Mlp]:
    """Return the MLPs for single tokens in a block: modules whose output is added, and those after an attention."""
    calls = [c for c in block.inner() if not any(c.within(a) or a.within(c) for a in attns)]
    whole = [c for c in calls if c.keeps_shape and num_matrices(c) >= 2]
    outermost = [c for c in whole if not any(c is not other and c.within(other) for other in whole)]
    found = [unwrap(trace, c, width_after(c)) for c in outermost]
    bare = _mlps_of_bare_matrices([c for c in calls if not any(c.within(other) for other in outermost)])
    found += [mlp for mlp in bare if not joins(trace, mlp, [*attns, *outermost])]  # two gates are no MLP
    mlps = {id(mlp.first): mlp for mlp in found if mlp.is_tokenwise and _adds(trace, mlp, block)}
    paired = (a.pair.mlp for a in inside if a.pair is not None)
    mlps |= {id(mlp.first): mlp for mlp in paired if mlp.first.within(block) and mlp.last.within(block)}
    return sorted(mlps.values(), key=lambda mlp: mlp.first.start)


def _mlps_of_bare_matrices(calls: Sequence[Call]) -> list[Mlp]:
    """Return the MLPs whose matrices the block calls itself: from the width of its tokens and back to it."""
    matrices = [c for c in calls if c.has_matrix and c.input is not None and c.holds_tokens(c.input)]
    found = [mlp_of_matrices(matrices[: i + 1], width_after(last)) for i, last in enumerate(matrices)]
    mlps = [mlp for mlp, last in zip(found, matrices, strict=True) if mlp is not None and mlp.last is last]
    return [mlp for mlp in mlps if not any(other.last is mlp.first for other in mlps)]


def _adds(trace: Trace, mlp: Mlp, block: Call) -> bool:
    """Return whether something is added in the block to what enters an MLP, or to what enters its norm."""
    entered = [mlp.first.input, *(norm.input for norm in norms_before(trace, mlp.first))]
    later = [add.result for add in trace.additions if mlp.last.stop < add.time < block.stop]
    sums = [add for result in later for add in sums_of(trace, result, block)]
    return any(add.adds_to(x) for add in sums for x in entered)


def _norms_of(trace: Trace, block: Call, branches: Sequence[Branch]) -> list[Call | None]:
    """Return the norm of each branch."""
    norms: list[Call | None] = []
    bounds = [block.start, *(last.stop for _, _, last in branches)]
    starts = [*(first.start for _, first, _ in branches), block.stop]
    for index, (_, first, last) in enumerate(branches):
        calls = [c for c in block.inner() if bounds[index] < c.start < starts[index + 1]]
        before = next((norm for norm in reversed(norms) if norm is not None), None)
        norm = norm_of(trace, first, last, calls, block, before)
        norms.append(None if norm in norms else norm)
    return norms
