"""Find the towers of a model: rows of blocks of which none reads another, such as those of CLIP's image and text."""

from __future__ import annotations

from collections.abc import Sequence

from petune.sites.flow import OUTPUTS
from petune.sites.site import Block
from petune.sites.trace import Call, Trace


def rows_of(trace: Trace, blocks: Sequence[Block]) -> list[list[Block]]:
    """Return the blocks of each tower, in the order of their last blocks; those of a decoder include its encoder's.

    A tower ends with a block that no other block reads, and that an output of the model was computed from.
    """
    sources, of_block = _sources(trace, blocks)
    ends = {key for key in of_block if not any(key in read for call, read in sources.items() if call != OUTPUTS)}
    ends = (ends & sources.get(OUTPUTS, ends)) or ends
    rows: dict[int, set[int]] = {}
    for key in sorted(ends):
        rows.setdefault(of_block[key], set()).update(_before(key, sources, of_block))
    if len(rows) < 2:
        return [list(blocks)]
    return [[block for i, block in enumerate(blocks) if i in rows[last]] for last in sorted(rows)]


def calls_after(trace: Trace, rows: Sequence[Sequence[Block]]) -> list[list[Call]]:
    """Return for each row the calls that read its last block, and not that of another row."""
    ends = {id(row[-1].exit): i for i, row in enumerate(rows)}
    spans = {call.start: ends[id(call.module)] for call in trace.calls if id(call.module) in ends}
    sources = trace.flow.sources(spans, [call.start for call in trace.calls])
    return [[call for call in trace.calls if sources.get(call.start) == {i}] for i in range(len(rows))]


def last_calls(trace: Trace, calls: Sequence[Call]) -> list[Call]:
    """Return those of some calls that none of the others reads."""
    keys = [call.start for call in calls]
    sources = trace.flow.sources({key: key for key in keys}, keys)
    return [call for call in calls if not any(call.start in sources[key] for key in keys if key != call.start)]


def _sources(trace: Trace, blocks: Sequence[Block]) -> tuple[dict[int, set[int]], dict[int, int]]:
    """Return what each call of a block, and the outputs, were computed from, and the block of each call.

    Calls have the times of their starts as keys: of the module that the block begins with.
    """
    enters = {id(block.enter): i for i, block in enumerate(blocks)}
    exits = {id(block.exit): i for i, block in enumerate(blocks)}
    of_block = {call.start: enters[id(call.module)] for call in trace.calls if id(call.module) in enters}
    spans: dict[int, int] = {}
    for call in trace.calls:
        block = exits.get(id(call.module))
        begun = [start for start, i in of_block.items() if i == block and start <= call.start]
        if begun:
            spans[call.start] = begun[-1]
    return trace.flow.sources(spans, [*of_block, OUTPUTS]), of_block


def _before(key: int, sources: dict[int, set[int]], of_block: dict[int, int]) -> set[int]:
    """Return the blocks that a call of a block was computed from, and that block."""
    return {of_block[key], *(of_block[other] for other in sources.get(key, ()))}
