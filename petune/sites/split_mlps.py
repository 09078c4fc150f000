"""Find the MLPs of a block that work on other tokens than its own MLP: those of a class token, a modality, a stream.

Multiway blocks (BEiT-3, VLMo) split their tokens and give each part to an MLP of its own. Blocks with two streams
(MMDiT) let both attend together, and have an MLP for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from petune.sites.find_mlp import unwrap
from petune.sites.layouts import layout_of, make_site, width_after
from petune.sites.matrices import num_matrices
from petune.sites.mlp import Mlp
from petune.sites.norms import is_norm
from petune.sites.site import Block, Site
from petune.sites.stream import norms_before
from petune.sites.trace import Call, Trace


def with_split_mlps(trace: Trace, blocks: Sequence[Block]) -> list[Block]:
    """Return the blocks with their `split_mlps`."""
    return [replace(block, split_mlps=_split_mlps(trace, block)) for block in blocks]


def _split_mlps(trace: Trace, block: Block) -> tuple[Site, ...]:
    own = [site for site in block.branches if site.role == "mlp"]
    if not own:
        return ()
    calls = _calls_in(trace, block)
    known = [c for site in block.branches for c in _ends(calls, site)]
    others = [c for c in calls if not any(c.within(k) or k.within(c) for k in known) and not is_norm(c)]
    whole = [c for c in others if c.keeps_shape and num_matrices(c) >= 2]
    outermost = [c for c in whole if not any(c is not other and c.within(other) for other in whole)]
    mlps = [unwrap(trace, c, width_after(c)) for c in outermost]
    of_own = [c for site in own for c in _ends(calls, site)]
    found = [mlp for mlp in mlps if mlp.is_tokenwise and _has_other_tokens(trace, mlp, of_own)]
    return tuple(_site(block, mlp) for mlp in found)


def _calls_in(trace: Trace, block: Block) -> list[Call]:
    """Return the calls inside a block; from its first module to its last, if it is no module itself."""
    first = next(c for c in trace.calls if c.module is block.enter)
    if block.is_module:
        return [*first.inner()]
    stop = next(c.stop for c in trace.calls if c.module is block.exit and c.stop > first.start)
    return [c for c in trace.calls if first.start <= c.start and c.stop <= stop]


def _ends(calls: Sequence[Call], site: Site) -> list[Call]:
    """Return the calls that bound a site: one, or its first and its last."""
    return [c for c in calls if c.module is site.enter or c.module is site.exit]


def _has_other_tokens(trace: Trace, mlp: Mlp, others: Sequence[Call]) -> bool:
    """Return whether an MLP reads neither what other MLPs read, nor anything that was computed by them, nor they it."""
    spans = {c.start: c.start for c in (mlp.last, *others)}
    sources = trace.flow.sources(spans, [mlp.first.start, *(c.start for c in others)])
    follows = bool(sources[mlp.first.start] & {c.start for c in others})
    precedes = any(mlp.last.start in sources[c.start] for c in others)
    read = {id(x) for c in others for x in _streams(trace, c)}
    return not follows and not precedes and read.isdisjoint(id(x) for x in _streams(trace, mlp.first))


def _streams(trace: Trace, call: Call) -> list[Tensor]:
    """Return what enters a call and its norms, and what that was reshaped from."""
    entered = [x for x in (call.input, *(norm.input for norm in norms_before(trace, call))) if x is not None]
    for x in entered:
        source = trace.reshaped.get(id(x), (x, None))[1]
        entered += [] if source is None else [source]
    return entered


def _site(block: Block, mlp: Mlp) -> Site:
    dim = width_after(mlp.last)
    return make_site("mlp", mlp.first, mlp.last, dim, block.model, layout_of(mlp.first, dim, block.layout))
