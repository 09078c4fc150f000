"""`find_sites`: trace one forward, and name everything that a tuner can edit."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from petune.base.arguments import check_input_size
from petune.base.errors import AttachError, UsageError
from petune.sites.blocks import find_blocks
from petune.sites.example import spec_of_example
from petune.sites.final_norms import find_norms
from petune.sites.grid import Grid, grid_and_prefix
from petune.sites.heads import find_heads, outside_of
from petune.sites.heads_by_user import HeadChoice
from petune.sites.input_size import input_sizes_of
from petune.sites.input_spec import InputSpec
from petune.sites.layouts import IMAGES, make_site
from petune.sites.outside_blocks import layers_outside_blocks
from petune.sites.own_layers import own_layers
from petune.sites.recorder import record
from petune.sites.site import Layout, Site, Tower
from petune.sites.sites import Sites
from petune.sites.towers import rows_of
from petune.sites.trace import Call, Trace
from petune.sites.undisturbed import without_adapters
from petune.sites.unsuitable import refuse_packed, refuse_scripted, refuse_uninitialized, why_all_in_head, why_no_blocks


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
    norms, further = find_norms(model, trace, spec, rows, head, others) if blocks else ([], [])
    ends = zip(rows, norms, further, strict=True) if len(rows) > 1 else ()
    towers = [Tower(blocks=tuple(row), norm=norm, further_norms=rest) for row, norm, rest in ends]
    parts = (_patch_embed(trace, first, grid), norms[0] if len(norms) == 1 else None, head)
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


def _patch_embed(trace: Trace, first: Call | None, grid: Grid | None) -> Site | None:
    """Return the widest call that holds the first matrix and returns as many tokens as there are patches."""
    start = next((c for c in trace.calls if c.has_matrix), None)
    if first is None or start is None or grid is None:
        return None
    widest: Call | None = None
    for call in start.lineage():
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
