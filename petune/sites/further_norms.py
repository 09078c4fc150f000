"""Find the norms between blocks and heads besides the final one: in a row, next to it, or of earlier blocks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from petune.sites.encoder import calls_of
from petune.sites.forward import black_image
from petune.sites.hooked import removed_after
from petune.sites.input_spec import InputSpec
from petune.sites.norms import is_norm
from petune.sites.returned import tensors_returned
from petune.sites.site import Block, Site, modules_of, modules_with_place
from petune.sites.trace import Call, Trace
from petune.sites.undisturbed import undisturbed


def norms_to_heads(
    trace: Trace, blocks: Sequence[Block], head: Site | None, calls: Sequence[Call]
) -> list[tuple[Call, set[int]]]:
    """Return the norms of tokens that read blocks, no matrix after these, and that no block reads.

    Args:
        trace: The forward.
        blocks: All blocks.
        head: Its norms do not count.
        calls: Those among which norms are looked for.

    Returns:
        One call of each module, with the indices of the blocks that it reads.
    """
    ends = {c.start: (c.stop, block.index) for block in blocks for c in trace.calls if c.module is block.exit}
    enters = [c.start for block in blocks for c in trace.calls if c.module is block.enter]
    norms = _norms_outside(trace, blocks, head, [c for c in calls if c.start > min(enters)])
    if not norms:
        return []
    first = min(stop for stop, _ in ends.values())
    within = {id(m) for m in modules_of(blocks)}
    layers = [c.start for c in trace.calls if c.start > first and c.has_matrix and id(c.module) not in within]
    spans = {start: start for start in (*ends, *layers, *(c.start for c in norms))}
    sources = trace.flow.sources(spans, [*(c.start for c in norms), *enters])
    between = {source for start in enters for source in sources.get(start, ())}
    found: dict[int, tuple[Call, set[int]]] = {}
    for norm in norms:
        read = sources.get(norm.start, set())
        last = max((ends[start][0] for start in read & ends.keys()), default=None)
        if last is not None and norm.start not in between and not any(start > last for start in read & {*layers}):
            found[id(norm.module)] = norm, {ends[start][1] for start in read & ends.keys()}
    return list(found.values())


def norms_read_by_blocks(trace: Trace, blocks: Sequence[Block], head: Site | None, calls: Iterable[Call]) -> list[Call]:
    """Return the norms of tokens outside blocks, after the first one begins, that a block reads.

    Args:
        trace: The forward.
        blocks: All blocks.
        head: Its norms do not count.
        calls: Those among which norms are looked for.
    """
    enters = [c.start for block in blocks for c in trace.calls if c.module is block.enter]
    norms = _norms_outside(trace, blocks, head, [c for c in calls if c.start > min(enters)])
    sources = trace.flow.sources({c.start: c.start for c in norms}, enters) if norms else {}
    read = {source for found in sources.values() for source in found}
    return [c for c in norms if c.start in read]


def _norms_outside(trace: Trace, blocks: Sequence[Block], head: Site | None, calls: Iterable[Call]) -> list[Call]:
    """Return the norms of tokens, and not of pooled features, in no block, no head and no other attention."""
    inside = modules_with_place(blocks, head)
    of_blocks = calls_of(trace, blocks)
    around = [c for op in trace.attention_ops for c in op.call.lineage()]
    pooling = {id(c) for c in around if not any(block.within(c) for block in of_blocks)}
    norms = [c for c in calls if is_norm(c) and c.module not in inside and c.input is not None]
    tokens = [c for c in norms if c.input is not None and c.holds_tokens(c.input)]
    return [c for c in tokens if not any(id(a) in pooling for a in c.ancestors())]


def with_effect(model: nn.Module, spec: InputSpec, modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Return those of some modules whose outputs reach what the model returns.

    A graph does not tell: tokens that are cut away later are in it, too. So each module returns NaN once, which also
    passes layers of zeros. No module is returned if the model does not run like that.
    """
    try:
        return [module for module in modules if _passes_nan(model, spec, module)]
    except Exception:  # whatever a model's own code raises at NaN
        return []


def _passes_nan(model: nn.Module, spec: InputSpec, module: nn.Module) -> bool:
    def replace(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return torch.full_like(output, torch.nan)

    with undisturbed(model), torch.no_grad(), removed_after([module.register_forward_hook(replace)]):
        returned = list(tensors_returned(black_image(model, spec).call(model)))
    return any(bool(y.isnan().any()) for y in returned if y.is_floating_point())
