"""Find attentions and MLPs that are in no block, so that methods which act in all blocks can name them."""

from __future__ import annotations

from collections.abc import Sequence

from petune.sites.attentions import Attention, find_attentions
from petune.sites.encoder import attends_to_others, end_of, start_of
from petune.sites.parts import Mlp, num_matrices
from petune.sites.site import Block, Site, modules_in, modules_of
from petune.sites.trace import Call, Trace


def layers_outside_blocks(trace: Trace, blocks: Sequence[Block], head: Site | None) -> dict[str, int]:
    """Return the layers between blocks, or after them in the encoder, that mix tokens or are an MLP for them.

    Such as cross-attention between two towers, which is in neither, self-attention after the final norm, and blocks that
    petune cannot tell from other code. What pools the tokens after the encoder is none, and neither are convolutions.

    Returns:
        The paths of the largest modules without a block, each with the index of the last block that begins before
        its last call.
    """
    inside = {id(m) for m in modules_of(blocks)} | {
        id(m) for block in blocks for own in block.own_modules for m in own.modules()
    }
    inside |= {id(m) for m in modules_in([head] if head is not None else [])}
    begun = [(c.start, block.index) for block in blocks for c in trace.calls if c.module is block.enter]
    bounds = {id(m) for block in blocks for m in block.modules}
    of_blocks = [c for c in trace.calls if id(c.module) in bounds]
    first, end = start_of(trace, blocks), _end_of_encoder(trace, blocks, of_blocks)
    attentions = {id(a.call): a for a in find_attentions(trace)}
    found: dict[str, int] = {}
    for call in trace.calls:
        is_inside = call.start < end or _mixes_tokens(attentions.get(id(call)))
        is_layer = id(call) in attentions or _is_mlp(call)
        if first < call.start and is_inside and id(call.module) not in inside and is_layer:
            around = _largest_without(call, of_blocks)
            if around is not None:
                found[around.path] = max(index for start, index in begun if start < around.start)
    return found


def _end_of_encoder(trace: Trace, blocks: Sequence[Block], of_blocks: Sequence[Call]) -> int:
    """Return when the innermost module that calls all blocks is left; when the last block is, if that is the model."""
    around = (c for c in of_blocks[-1].ancestors() if all(other.within(c) for other in of_blocks))
    encoder = next(around, trace.root) if of_blocks else trace.root
    return end_of(trace, blocks) if encoder is trace.root else encoder.stop


def _mixes_tokens(attention: Attention | None) -> bool:
    """Return whether an attention is from tokens to the same tokens: it does not pool them."""
    if attention is None or not attention.many_queries:
        return False
    return attention.call.keeps_shape and not attends_to_others(attention.call)


def _is_mlp(call: Call) -> bool:
    return call.keeps_shape and num_matrices(call) >= 2 and Mlp(call, call).is_tokenwise


def _largest_without(call: Call, of_blocks: Sequence[Call]) -> Call | None:
    """Return the largest call around another one that holds no block; None if a block holds it."""
    largest: Call | None = None
    for around in (call, *call.ancestors()):
        if any(around.within(block) for block in of_blocks):
            return None
        if any(block.within(around) for block in of_blocks):
            break
        largest = around
    return largest
