"""Find the final norm of each tower, and the further norms between blocks and heads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from petune.sites.encoder import end_of
from petune.sites.further_norms import norms_to_heads, with_effect
from petune.sites.input_spec import InputSpec
from petune.sites.layouts import make_site
from petune.sites.norms import is_norm
from petune.sites.site import Block, Site, is_within, modules_in
from petune.sites.stream import addition_to
from petune.sites.towers import calls_after, last_calls
from petune.sites.trace import Call, Trace
from petune.sites.used_parameters import used_parameters


def find_norms(
    model: nn.Module,
    trace: Trace,
    spec: InputSpec,
    rows: list[list[Block]],
    head: Site | None,
    others: Iterable[str],
) -> tuple[list[Site | None], list[tuple[Site, ...]]]:
    """Return the final norm of each tower, or None, and the further norms that its heads read.

    Args:
        model: The model.
        trace: Its forward.
        spec: What it takes.
        rows: The blocks of each tower.
        head: The classifier.
        others: Paths of layers of the transformer that are in no block; norms inside are their own.
    """
    calls = _calls_outside(trace, others)
    of_stream = _without_branch_norms(trace, calls, others)
    norms = [_if_used(model, norm, spec) for norm in _final_norms(trace, rows, head, of_stream)]
    found = norms_to_heads(trace, [block for row in rows for block in row], head, calls)
    return _with_further(model, trace, spec, rows, norms, found)


def _calls_outside(trace: Trace, others: Iterable[str]) -> list[Call]:
    """Return the calls outside some modules, and norms that these begin with and that no residual addition skips."""
    inside = {id(c): path for path in others for c in trace.calls if is_within(c.path, path)}
    layers = [c for c in trace.calls if id(c) in inside and c.has_matrix and not is_norm(c)]

    def opens(norm: Call) -> bool:
        path, x = inside[id(norm)], norm.input
        if not is_norm(norm):
            return False
        is_first = not any(c.start < norm.start and inside[id(c)] == path and not norm.within(c) for c in layers)
        return is_first and x is not None and addition_to(trace, x, norm.stop) is None

    return [c for c in trace.calls if id(c) not in inside or opens(c)]


def _without_branch_norms(trace: Trace, calls: Sequence[Call], others: Iterable[str]) -> list[Call]:
    """Return calls without the norms of branches: those before one of some modules, while an addition skips both."""
    paths = {*others}
    before = [trace.maker(c.input) for c in trace.calls if c.path in paths]
    branch = {id(c) for c in before if c and is_norm(c) and c.input is not None and addition_to(trace, c.input, c.stop)}
    return [c for c in calls if id(c) not in branch]


def _final_norms(trace: Trace, rows: list[list[Block]], head: Site | None, calls: Sequence[Call]) -> list[Site | None]:
    """Return the final norm of each tower: one that reads that tower alone, else one after all of them.

    Args:
        trace: The forward.
        rows: The blocks of each tower.
        head: The classifier.
        calls: Those outside attentions and MLPs that are in no block, whose norms are their own.
    """
    if len(rows) == 1:
        return [_final_norm(trace, end_of(trace, rows[0]), head, calls)]
    ends = [end_of(trace, row[-1:]) for row in rows]
    kept = {id(c) for c in calls}
    after = [[c for c in row if id(c) in kept] for row in calls_after(trace, rows)]
    own = [_final_norm(trace, end, head, calls) for end, calls in zip(ends, after, strict=True)]
    if any(own):
        return own
    joint = _norms_between(trace, max(ends), head, calls)
    last = last_calls(trace, joint)
    if len(last) == len(rows):  # one for each row, after an exchange between the rows (timm's CrossViT)
        return [_norm_site(trace, norm) for norm in last]
    return [_final_norm(trace, max(ends), head, calls)] * len(rows)


def _final_norm(trace: Trace, blocks_end: int, head: Site | None, calls: Sequence[Call]) -> Site | None:
    """Return the last norm between the last block and the classifier, outside attention pooling.

    A norm of layers that pooled features go through, such as those of an MLP as classifier, does not count if there is
    one before.

    Args:
        trace: The forward.
        blocks_end: When the last block is left.
        head: The classifier.
        calls: Those among which it is looked for.
    """
    norms = _norms_between(trace, blocks_end, head, calls)
    if not norms:
        return None
    end = _start_of_head(trace, blocks_end, head)
    later = [c for c in calls if c.start > blocks_end and c.has_matrix]
    of_features = [c.start for c in norms if c.input is not None and c.input.ndim == 2]
    pooled = next((c.start for c in later if c.input is not None and c.input.ndim == 2), end)
    norm = next((c for c in reversed(norms) if c.start < min([pooled, *of_features])), None)
    norm = norm or next((c for c in reversed(norms) if c.start < pooled), norms[-1])
    return _norm_site(trace, norm)


def _norms_between(trace: Trace, blocks_end: int, head: Site | None, calls: Sequence[Call]) -> list[Call]:
    """Return the norms among some calls between the last block and the classifier, outside attention pooling."""
    end = _start_of_head(trace, blocks_end, head)
    # a module around all blocks (a backbone, an encoder) starts before their end, one that pools does not
    around = [c for op in trace.attention_ops for c in op.call.lineage()]
    pooling = {id(c) for c in around if c.start > blocks_end}
    norms = [c for c in calls if blocks_end < c.start < end and is_norm(c)]
    return [c for c in norms if not any(id(a) in pooling for a in c.ancestors())]


def _start_of_head(trace: Trace, blocks_end: int, head: Site | None) -> int:
    heads = modules_in([head]) if head is not None else set()
    return next((c.start for c in trace.calls if c.module in heads and c.start > blocks_end), trace.root.stop)


def _norm_site(trace: Trace, norm: Call) -> Site:
    dim = max((p.numel() for p in norm.module.parameters()), default=norm.width)  # Dynamic Tanh has a scalar, too
    return make_site("norm", norm, norm, dim, trace.model_name)


def _if_used(model: nn.Module, norm: Site | None, spec: InputSpec) -> Site | None:
    """Return a norm, if the output depends on it: it may be of features that the classifier does not read."""
    parameters = [] if norm is None else [p for p in norm.enter.parameters() if p.is_floating_point()]
    return norm if not parameters or used_parameters(model, spec, parameters) else None


def _with_further(
    model: nn.Module,
    trace: Trace,
    spec: InputSpec,
    rows: Sequence[Sequence[Block]],
    norms: list[Site | None],
    found: Sequence[tuple[Call, set[int]]],
) -> tuple[list[Site | None], list[tuple[Site, ...]]]:
    """Return the final norm of each tower, or another one if no output reads it, and the further ones that are read.

    Args:
        model: The model.
        trace: Its forward.
        spec: What it takes.
        rows: The blocks of each tower.
        norms: The final norms; None if one of several heads reads the blocks themselves.
        found: See `norms_to_heads`.
    """
    known = {norm.enter for norm in norms if norm is not None}
    if all(call.module in known for call, _ in found):
        return norms, [() for _ in rows]
    read = {*with_effect(model, spec, [call.module for call, _ in found])}
    live = [(_norm_site(trace, call), blocks) for call, blocks in found if call.module in read]
    is_idle = any(call.module in known for call, _ in found) and known.isdisjoint(read)
    if len(rows) == 1 and is_idle and live:
        norms = [live[-1][0]]
    known = {norm.enter for norm in norms if norm is not None}
    others = [(site, blocks) for site, blocks in live if site.enter not in known]
    return norms, [tuple(site for site, blocks in others if blocks <= {b.index for b in row}) for row in rows]
