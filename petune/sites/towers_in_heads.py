"""Take whole encoders out of what was found as heads: a tower that reads the input itself is no head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set

from torch import nn

from petune.sites.flow import INPUTS, OUTPUTS
from petune.sites.heads_by_library import holds_matrix
from petune.sites.heads_by_trace import head_site
from petune.sites.heads_by_user import outermost
from petune.sites.site import Block, Site, modules_in, modules_with_place
from petune.sites.trace import Trace


def without_towers(trace: Trace, blocks: Sequence[Block], head: Site) -> Site | None:
    """Return the heads without the encoders inside them, such as that of the field of view in Depth Pro.

    An encoder reads the inputs of the model, and nothing that a layer outside the heads has made; a decoder reads what
    another encoder made, and stays. Of a head with an encoder the layers remain that the encoder does not need.

    Args:
        trace: The forward.
        blocks: All blocks. If all of them are in heads, the heads stay as they are.
        head: The heads that were found.

    Returns:
        None if no layer remains.
    """
    known = modules_in([head])
    inside = [block for block in blocks if block.enter in known]
    if not inside or len(inside) == len(blocks):
        return head
    towers = _reading_inputs(trace, inside, known)
    if not towers:
        return head
    needed, used = _needed(trace, towers), _used(trace)
    kept = [found for path, module in head.named_modules for found in _remaining(path, module, needed, used)]
    return head_site(outermost(kept), head.model) if kept else None


def _reading_inputs(trace: Trace, blocks: Sequence[Block], known: set[nn.Module]) -> list[Block]:
    """Return the blocks that read the model's inputs, and nothing that a matrix outside the modules `known` made."""
    outside = {c.start for c in trace.calls if c.module not in known and holds_matrix(c.module)}
    entered = {c.start: c.module for c in trace.calls}
    of_block = {start: block for start, m in entered.items() for block in blocks if block.enter is m}
    sources = trace.flow.sources({INPUTS: INPUTS} | {start: start for start in outside}, of_block)
    reading = [of_block[key] for key, read in sources.items() if INPUTS in read and read.isdisjoint(outside)]
    return [block for block in blocks if block in reading]


def _needed(trace: Trace, towers: Sequence[Block]) -> set[nn.Module]:
    """Return the modules of blocks, and those that have computed something that enters one of them."""
    enters = {block.enter for block in towers}
    starts = [c.start for c in trace.calls if c.module in enters]
    sources = trace.flow.sources({c.start: c.start for c in trace.calls}, starts)
    before = {c.module for c in trace.calls if any(c.start in sources[start] for start in starts)}
    return modules_with_place(towers, None) | before


def _used(trace: Trace) -> set[nn.Module]:
    """Return the modules that have computed something that the output depends on."""
    sources = trace.flow.sources({c.start: c.start for c in trace.calls}, [OUTPUTS])
    return {c.module for c in trace.calls if c.start in sources[OUTPUTS]}


def _remaining(
    path: str, module: nn.Module, needed: Set[nn.Module], used: Set[nn.Module]
) -> Iterator[tuple[str, nn.Module]]:
    """Yield what remains of a head: the largest modules with a matrix that are used, and hold nothing needed."""
    modules = {*module.modules()}
    if not modules.isdisjoint(needed):
        for name, child in module.named_children() if module not in needed else ():
            yield from _remaining(f"{path}.{name}", child, needed, used)
    elif holds_matrix(module) and not modules.isdisjoint(used):
        yield path, module
