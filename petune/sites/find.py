"""`find_sites`: trace one forward, and name everything that a tuner can edit."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from petune.base.arguments import check_input_size
from petune.base.errors import AttachError, UsageError
from petune.sites.blocks import find_blocks
from petune.sites.chosen_head import HeadChoice
from petune.sites.encoder import end_of
from petune.sites.example import spec_of_example
from petune.sites.further_norms import norms_to_heads, with_effect
from petune.sites.grid import Grid, grid_and_prefix
from petune.sites.heads import find_heads, outside_of
from petune.sites.input_size import input_sizes_of
from petune.sites.input_spec import InputSpec
from petune.sites.layouts import IMAGES, make_site
from petune.sites.norms import is_norm
from petune.sites.outside_blocks import layers_outside_blocks
from petune.sites.own_layers import own_layers
from petune.sites.parts import addition_to
from petune.sites.recorder import record
from petune.sites.site import Block, Layout, Site, Tower, is_within, modules_in
from petune.sites.sites import Sites
from petune.sites.towers import calls_after, last_calls, rows_of
from petune.sites.trace import Call, Trace
from petune.sites.undisturbed import without_adapters
from petune.sites.unsuitable import refuse_packed, refuse_scripted, refuse_uninitialized, why_all_in_head, why_no_blocks
from petune.sites.used_parameters import used_parameters


def find_sites(
    model: nn.Module,
    input_size: Sequence[int] | None = None,
    *,
    example: Any = None,
    head: HeadChoice | None = None,
) -> Sites:
    """Find the blocks, norms and head of any Vision Transformer, by structure and not by name.

    The model is run in eval mode, on the meta device if possible: once to see its calls, and again for what that leaves
    open, such as whether the output depends on a norm, which tokens are patches, or what size its images have. Its
    weights, modes and the random state are not changed.

    Args:
        model: Any image classifier: timm, torchvision, transformers, hand-written; with `example` any Transformer.
        input_size: (channels, height, width), or four numbers for videos and volumes in the order that the model
            takes; by default the size that the model has as an attribute or in its config.
        example: What the forward takes, for a model that takes more than one tensor, or whose input is no image: a
            tensor with its batch dimension, a tuple of arguments, a dict (`model(**example)`, or `model(example)` if
            the forward takes a dict), or `(args, kwargs)`. Only shapes, dtypes and integers are remembered.
        head: The modules that predict, if they are others than petune finds: a dotted path, a module of the model, a
            pattern of paths such as `*_embed`, or a list of them.

    Returns:
        All sites. A model without attention has empty `blocks`.

    Raises:
        AttachError: The model does not tell its input size, its forward fails at that size or on the example, or it has
            no such `head`.
        UsageError: Both `input_size` and `example` are given, or `head` is empty.
    """
    if not isinstance(model, nn.Module):
        raise AttachError(f"find_sites needs a model, an nn.Module, but was given {type(model).__name__}")
    check_input_size("find_sites", input_size)
    if input_size is not None and example is not None:
        raise UsageError("find_sites: give input_size or example, not both")
    if example is not None:
        return _find(model, lambda: [spec_of_example(model, example)], head)
    sizes = [input_size] if input_size is not None else input_sizes_of(model)
    return _find(model, lambda: [InputSpec.of_size(size) for size in sizes], head)


def sites_for(model: nn.Module, spec: InputSpec, head: HeadChoice | None = None) -> Sites:
    """Return the sites of a model that takes inputs of a known form; see `find_sites`."""
    return _find(model, lambda: [spec], head)


def _find(model: nn.Module, specs: Callable[[], list[InputSpec]], head: HeadChoice | None) -> Sites:
    """Return the sites, found without the adapters of all attachments.

    Args:
        model: The model.
        specs: Returns candidates for what it takes; it may run the model.
        head: See `find_sites`.
    """
    refuse_scripted(model)
    refuse_uninitialized(model)
    with without_adapters(model) as added:
        trace, spec = _first_that_runs(model, specs(), added)
        return _build_sites(model, trace, spec, head)


def _first_that_runs(model: nn.Module, specs: list[InputSpec], added: set[nn.Module]) -> tuple[Trace, InputSpec]:
    for spec in specs[:-1]:
        with contextlib.suppress(AttachError):
            return record(model, spec, added), spec
    return record(model, specs[-1], added), specs[-1]


def _build_sites(model: nn.Module, trace: Trace, spec: InputSpec, choice: HeadChoice | None) -> Sites:
    blocks = find_blocks(trace)
    heads = find_heads(model, trace, blocks, choice)
    head = heads.site
    if not blocks or head is None:
        refuse_packed(model)
    reason = "" if blocks else why_no_blocks(trace)
    outside = outside_of(head, blocks)
    if blocks and head is not None and not outside:
        reason = why_all_in_head(blocks, head)
    blocks = outside
    bounds = {id(m) for block in blocks for m in block.modules}
    first = next((c for c in trace.calls if id(c.module) in bounds), None)
    grid, num_prefix_tokens = grid_and_prefix(model, trace, first, spec)
    rows = rows_of(trace, blocks)
    others = layers_outside_blocks(trace, blocks, head) if blocks else {}
    calls = _calls_outside(trace, others)
    of_stream = _without_branch_norms(trace, calls, others)
    norms = [_if_used(model, norm, spec) for norm in _final_norms(trace, rows, head, of_stream)] if blocks else []
    further: list[tuple[Site, ...]] = []
    if blocks:
        found = norms_to_heads(trace, blocks, head, calls)
        norms, further = _with_further(model, trace, spec, rows, norms, found)
    several = len(rows) > 1
    ends = zip(rows, norms, further, strict=True) if several else ()
    towers = [Tower(blocks=tuple(row), norm=norm, further_norms=others) for row, norm, others in ends]
    norm = norms[0] if len(norms) == 1 else None
    parts = (_patch_embed(trace, first, grid), norm, head)
    return Sites(
        model=trace.model_name,
        input_spec=spec,
        blocks=blocks,
        parts={part.role: part for part in parts if part is not None},
        layers_before_head=heads.layers_before,
        outside_blocks=others,
        layers=own_layers(trace, spec, rows, [n for n in (*norms, *itertools.chain(*further)) if n], head, others),
        further_norms=further[0] if len(further) == 1 else (),
        num_prefix_tokens=num_prefix_tokens,
        embed_dim=blocks[-1].dim if blocks else 0,
        grid_size=grid,
        chosen_head=heads.chosen,
        why_no_blocks=reason,
        all_towers=tuple(towers),
        num_outputs=sum(y.is_floating_point() for y in trace.outputs),
        draws_nothing=trace.draws_nothing,
    )


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


def _if_used(model: nn.Module, norm: Site | None, spec: InputSpec) -> Site | None:
    """Return a norm, if the output depends on it: it may be of features that the classifier does not read."""
    parameters = [] if norm is None else [p for p in norm.enter.parameters() if p.is_floating_point()]
    return norm if not parameters or used_parameters(model, spec, parameters) else None


def _patch_embed(trace: Trace, first: Call | None, grid: Grid | None) -> Site | None:
    """Return the widest call that holds the first matrix and returns as many tokens as there are patches."""
    start = next((c for c in trace.calls if c.has_matrix), None)
    if first is None or start is None or grid is None:
        return None
    widest: Call | None = None
    for call in (start, *start.ancestors()):
        y = call.output
        if call.stop > first.start or y is None:
            break
        is_image = y.ndim in IMAGES and grid in (tuple(y.shape[2:]), tuple(y.shape[1:-1]))
        if is_image or (y.ndim == 3 and y.shape[1] == math.prod(grid)):
            widest = call
    if widest is None or widest.output is None:
        return None
    y = widest.output
    channels_second = y.ndim in IMAGES and tuple(y.shape[2:]) == grid
    dim = int(y.shape[1] if channels_second else y.shape[-1])
    layout: Layout = "BNC" if y.ndim == 3 else "BCHW" if channels_second else "BHWC"
    return replace(make_site("patch_embed", widest, widest, dim, trace.model_name), layout=layout)


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


def _norm_site(trace: Trace, norm: Call) -> Site:
    dim = max((p.numel() for p in norm.module.parameters()), default=norm.width)  # Dynamic Tanh has a scalar, too
    return make_site("norm", norm, norm, dim, trace.model_name)


def _start_of_head(trace: Trace, blocks_end: int, head: Site | None) -> int:
    heads = modules_in([head]) if head is not None else set()
    return next((c.start for c in trace.calls if c.module in heads and c.start > blocks_end), trace.root.stop)


def _norms_between(trace: Trace, blocks_end: int, head: Site | None, calls: Sequence[Call]) -> list[Call]:
    """Return the norms among some calls between the last block and the classifier, outside attention pooling."""
    end = _start_of_head(trace, blocks_end, head)
    # a module around all blocks (a backbone, an encoder) starts before their end, one that pools does not
    around = [c for op in trace.attention_ops for c in (op.call, *op.call.ancestors())]
    pooling = {id(c) for c in around if c.start > blocks_end}
    norms = [c for c in calls if blocks_end < c.start < end and is_norm(c)]
    return [c for c in norms if not any(id(a) in pooling for a in c.ancestors())]
