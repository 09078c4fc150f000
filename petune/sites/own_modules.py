"""Find the modules that hold a block's weights, of a block that is no module itself."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from petune.sites.matrices import num_matrices
from petune.sites.site import Block, is_within
from petune.sites.trace import Trace


def with_own_modules(trace: Trace, blocks: Sequence[Block]) -> tuple[Block, ...]:
    """Return the blocks with their `own_modules`."""
    return tuple(replace(block, own_modules=_own_modules(trace, block, blocks)) for block in blocks)


def _own_modules(trace: Trace, block: Block, blocks: Sequence[Block]) -> tuple[nn.Module, ...]:
    """Return what a block consists of.

    That is the list around it, if no other block is in there, else what is called between its two ends; and its norms
    that are elsewhere.
    """
    if block.is_module:
        return (block.enter,)
    path = _common_path(block.path, block.exit_path)
    inside = (end for other in blocks if other is not block for end in (other.path, other.exit_path))
    container = trace.root.module.get_submodule(path)
    is_list = path != "" and not any(c.module is container for c in trace.calls)
    is_alone = is_list and not any(is_within(end, path) for end in inside) and not _has_others(trace, block, path)
    own = [container] if is_alone else _between_ends(trace, block)
    bounds = [module for site in block.parts.values() if not site.read_only for module in site.modules]
    owned = {id(m) for module in own for m in module.modules()}
    return tuple(dict.fromkeys([*own, *(module for module in bounds if id(module) not in owned)]))


def _has_others(trace: Trace, block: Block, path: str) -> bool:
    """Return whether a list holds attentions or MLPs that are called before or after a block in it."""
    first = min(c.start for c in trace.calls if c.module is block.enter)
    last = max(c.stop for c in trace.calls if c.module is block.exit)
    others = [c for c in trace.calls if is_within(c.path, path) and (c.stop < first or c.start > last)]
    return any(num_matrices(c) > 1 for c in others)


def _common_path(first: str, last: str) -> str:
    """Return the path of the innermost module that holds two modules."""
    names = zip(first.split("."), last.split("."), strict=False)
    return ".".join(name for name, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], names))


def _between_ends(trace: Trace, block: Block) -> list[nn.Module]:
    """Return the modules that are called from a block's first to its last, in all rounds if it is called in a loop.

    A module that is called elsewhere too, such as a dropout of all blocks, is not the block's own.
    """
    starts = [c.start for c in trace.calls if c.module is block.enter]
    stops = [c.stop for c in trace.calls if c.module is block.exit]
    rounds = [(start, min(stop for stop in stops if stop > start)) for start in starts if start < stops[-1]]
    within = [c for c in trace.calls if any(start <= c.start and c.stop <= stop for start, stop in rounds)]
    inside = {id(c) for c in within}
    outside = {id(c.module) for c in trace.calls if id(c) not in inside}
    return [c.module for c in within if id(c.parent) not in inside and id(c.module) not in outside]
