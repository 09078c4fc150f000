"""Find attentions, MLPs and linear layers that are in no block, so that methods which act in all blocks name them."""

from __future__ import annotations

from collections.abc import Sequence

from petune.sites.attentions import TracedAttention, find_attentions
from petune.sites.encoder import attends_to_others, calls_of, end_of, start_of
from petune.sites.layouts import IMAGES, is_conv
from petune.sites.matrices import num_matrices
from petune.sites.mlp import Mlp, holds_one_row
from petune.sites.site import Block, Site, modules_with_place
from petune.sites.trace import Call, Trace


def layers_outside_blocks(trace: Trace, blocks: Sequence[Block], head: Site | None) -> dict[str, int]:
    """Return the layers before, between or after blocks that belong to the transformer: they mix tokens or map each.

    Such as cross-attention between two towers, which is in neither, self-attention after the final norm, an MLP before
    the first block, linear layers between two blocks of the same tokens, and blocks that petune cannot tell from other
    code. What pools the tokens after the encoder is none, and neither are convolutions and what changes the tokens'
    number or width between two stages.

    Returns:
        The paths of the largest modules without a block, and the keys of single parameters in products, each with the
        index of the last block that begins before its last call; 0 before the first block.
    """
    inside = modules_with_place(blocks, head)
    begun = [(c.start, block.index) for block in blocks for c in trace.calls if c.module is block.enter]
    of_blocks = calls_of(trace, blocks)
    span = start_of(trace, blocks), _end_of_encoder(trace, blocks, of_blocks)
    attentions = {id(a.call): a for a in find_attentions(trace)}
    found: dict[str, int] = {}
    for call in trace.calls:
        is_other = call.module not in inside
        if is_other and _is_layer(call, attentions.get(id(call)), of_blocks, span):
            around = largest_without(call, of_blocks)
            if around is not None:
                found[around.path] = last_before(begun, around.start)
    return found | {key: last_before(begun, time) for time, key in _bare_products(trace, blocks, of_blocks)}


def last_before(begun: Sequence[tuple[int, int]], time: int) -> int:
    """Return the index of the last block that begins before a time."""
    return max((index for start, index in begun if start < time), default=0)


def _is_layer(call: Call, attention: TracedAttention | None, of_blocks: Sequence[Call], span: tuple[int, int]) -> bool:
    """Return whether a call outside blocks is a layer of the transformer.

    Args:
        call: The call.
        attention: What it is, if it is an attention.
        of_blocks: The calls that bound blocks.
        span: When the first block is entered, and when the encoder is left.
    """
    start, end = span
    if call.start < start:
        return call.stop < start and _is_mlp(call, of_blocks) and _has_tokens_of(call, of_blocks[0])
    if call.start > end:
        return _mixes_tokens(attention)
    return attention is not None or _is_mlp(call, of_blocks) or _is_linear_between(call, of_blocks)


def _has_tokens_of(call: Call, block: Call) -> bool:
    """Return whether a call before a block returns tokens in a row of the shape that the block takes."""
    x, y = block.input, call.output
    return x is not None and y is not None and y.ndim == 3 and y.shape[-1] == x.shape[-1] and len(y) == len(x)


def _is_linear_between(call: Call, of_blocks: Sequence[Call]) -> bool:
    """Return whether a call is a linear layer for tokens between two blocks of the same tokens."""
    x = call.input
    if not call.has_matrix or is_conv(call) or x is None or not x.is_floating_point() or not call.holds_tokens(x):
        return False
    before = max((c for c in of_blocks if c.stop < call.start), key=lambda c: c.stop, default=None)
    after = min((c for c in of_blocks if c.start > call.stop), key=lambda c: c.start, default=None)
    if before is None or after is None or before.output is None or after.input is None:
        return False
    y = after.input
    return before.output.shape == y.shape and x.numel() // x.shape[-1] == y.numel() // y.shape[-1]


def _bare_products(trace: Trace, blocks: Sequence[Block], of_blocks: Sequence[Call]) -> list[tuple[int, str]]:
    """Return times and keys of the products with parameters that modules around blocks compute between these."""
    first, end = min((c.stop for c in of_blocks), default=0), end_of(trace, blocks)
    around = {id(call) for block in of_blocks for call in block.ancestors()}
    return [(time, key) for time, call, key in trace.products if first < time < end and id(call) in around]


def _end_of_encoder(trace: Trace, blocks: Sequence[Block], of_blocks: Sequence[Call]) -> int:
    """Return when the innermost module that calls all blocks is left; when the last block is, if that is the model."""
    around = (c for last in of_blocks[-1:] for c in last.ancestors() if all(other.within(c) for other in of_blocks))
    encoder = next(around, trace.root)
    return end_of(trace, blocks) if encoder is trace.root else encoder.stop


def _mixes_tokens(attention: TracedAttention | None) -> bool:
    """Return whether an attention is from tokens to the same tokens: it does not pool them."""
    if attention is None or not attention.many_queries:
        return False
    return attention.call.keeps_shape and not attends_to_others(attention.call)


def _is_mlp(call: Call, of_blocks: Sequence[Call]) -> bool:
    if not call.keeps_shape or num_matrices(call) < 2 or _is_pooled_map(call, of_blocks):
        return False
    return Mlp(call, call).is_tokenwise


def _is_pooled_map(call: Call, of_blocks: Sequence[Call]) -> bool:
    """Return whether a call takes a map of one pixel for each sample, as layers of a gate do, and blocks take more."""
    x, entered = call.input, [block.input for block in of_blocks]
    if x is None or x.ndim not in IMAGES or not holds_one_row(x):
        return False
    return not any(y is not None and holds_one_row(y) for y in entered)


def largest_without(call: Call, of_blocks: Sequence[Call]) -> Call | None:
    """Return the largest call around another one that holds no block; None if a block holds it."""
    largest: Call | None = None
    for around in call.lineage():
        if any(around.within(block) for block in of_blocks):
            return None
        if any(block.within(around) for block in of_blocks):
            break
        largest = around
    return largest
