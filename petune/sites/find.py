"""`find_sites`: one traced forward, and everything a tuner can edit is named."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from typing import Any

from torch import nn

from petune.base.arguments import check_input_size
from petune.base.errors import AttachError
from petune.sites.blocks import find_blocks
from petune.sites.input_size import input_sizes_of
from petune.sites.layouts import channel_axis, is_conv, site
from petune.sites.parts import is_norm
from petune.sites.recorder import record
from petune.sites.site import Block, Layout, Site, Sites
from petune.sites.trace import Call, Trace


def find_sites(model: nn.Module, input_size: tuple[int, int, int] | None = None, *, head: str | None = None) -> Sites:
    """Find the blocks, norms and head of any Vision Transformer, by structure and not by name.

    The model is run once, without gradient and in eval mode, on the meta device where that is possible; its
    weights, modes and the random state are not touched.

    Args:
        model: Any image classifier: timm, torchvision, transformers, hand-written.
        input_size: (channels, height, width); by default what the model tells about itself.
        head: Path of the module that is the classifier, where that is more than the layer that makes the logits.

    Returns:
        All sites. A model without attention has empty `blocks`.

    Raises:
        AttachError: The model does not tell its input size, or its forward fails at that size; it has no such `head`.
    """
    if not isinstance(model, nn.Module):
        raise AttachError(f"find_sites needs a model, an nn.Module, but was given {type(model).__name__}")
    check_input_size("find_sites", input_size)
    sizes = [input_size] if input_size is not None else input_sizes_of(model)
    added = {m for holder in model.modules() if hasattr(holder, "is_petune_holder") for m in holder.modules()}
    holders: list[Any] = [h for h in added if hasattr(h, "enabled")]
    enabled = [h.enabled for h in holders]
    try:
        for holder in holders:
            holder.enabled = False
        trace, size = _first_that_runs(model, sizes, added)
    finally:
        for holder, was in zip(holders, enabled, strict=True):
            holder.enabled = was
    return _sites(model, trace, size, head)


def _first_that_runs(
    model: nn.Module, sizes: list[tuple[int, int, int]], added: set[nn.Module]
) -> tuple[Trace, tuple[int, int, int]]:
    for size in sizes[:-1]:
        with contextlib.suppress(AttachError):
            return record(model, size, added), size
    return record(model, sizes[-1], added), sizes[-1]


def _sites(model: nn.Module, trace: Trace, size: tuple[int, int, int], head_path: str | None) -> Sites:
    name = type(model).__name__
    blocks = find_blocks(trace, name)
    calls = _block_calls(trace, blocks)
    first = calls[0] if calls else None
    last_stop = max((c.stop for c in calls), default=0)
    grid, prefix = _grid_and_prefix(model, trace, first, size)
    head = _head(model, trace, last_stop, name) if head_path is None else _given_head(model, head_path, name)
    norm = _final_norm(trace, last_stop, head, name) if blocks else None
    parts = (_patch_embed(trace, first, grid, name), norm, head)
    return Sites(
        model=name,
        input_size=size,
        blocks=blocks,
        parts={part.role: part for part in parts if part is not None},
        beside_head=_beside_head(model, trace, last_stop, head),
        num_prefix_tokens=prefix,
        embed_dim=blocks[-1].dim if blocks else 0,
        grid_size=grid,
    )


def _block_calls(trace: Trace, blocks: tuple[Block, ...]) -> list[Call]:
    edges = {id(m) for b in blocks for m in b.modules}
    return [c for c in trace.calls if id(c.module) in edges]


def _grid_and_prefix(
    model: nn.Module, trace: Trace, first: Call | None, size: tuple[int, int, int]
) -> tuple[tuple[int, int] | None, int]:
    """Rows and columns of patches where the first block is entered, and the tokens before them."""
    if first is None or first.input is None:
        return None, 0
    x = first.input
    if x.ndim == 4:
        return ((x.shape[2], x.shape[3]) if channel_axis(first) == 1 else (x.shape[1], x.shape[2])), 0
    tokens = x.shape[1]
    grid = _grid(trace, first, tokens, size)
    told: Any = next((m.num_prefix_tokens for m in model.modules() if hasattr(m, "num_prefix_tokens")), None)
    if grid is None:
        return None, int(told or 0)
    return grid, tokens - grid[0] * grid[1]


def _grid(trace: Trace, first: Call, tokens: int, size: tuple[int, int, int]) -> tuple[int, int] | None:
    """From the last convolution before the blocks, or from the tokens that the first matrix makes."""
    before = [c for c in trace.calls if c.has_matrix and c.stop < first.start and c.output is not None]
    for call in reversed(before):
        y = call.output
        if y is not None and y.ndim == 4 and is_conv(call) and 0 <= tokens - y.shape[2] * y.shape[3] <= 64:
            return int(y.shape[2]), int(y.shape[3])
    for call in reversed(before):
        y = call.output
        if y is not None and y.ndim == 3 and 0 <= tokens - y.shape[1] <= 64:
            rows = round(math.sqrt(y.shape[1] * size[1] / size[2]))
            if rows and y.shape[1] % rows == 0:
                return rows, y.shape[1] // rows
    return None


def _patch_embed(trace: Trace, first: Call | None, grid: tuple[int, int] | None, model: str) -> Site | None:
    """The widest call that holds the first matrix and returns as many tokens as there are patches."""
    start = next((c for c in trace.calls if c.has_matrix), None)
    if first is None or start is None or grid is None:
        return None
    best: Call | None = None
    for call in (start, *start.ancestors()):
        y = call.output
        if call.stop > first.start or y is None:
            break
        patches = y.shape[1] if y.ndim == 3 else None
        if patches == grid[0] * grid[1] or (y.ndim == 4 and grid in (tuple(y.shape[2:]), tuple(y.shape[1:3]))):
            best = call
    if best is None or best.output is None:
        return None
    y = best.output
    channels_second = y.ndim == 4 and tuple(y.shape[2:]) == grid
    found = site("patch_embed", best, best, int(y.shape[1] if channels_second else y.shape[-1]), model, "BHWC")
    layout: Layout = "BNC" if y.ndim == 3 else "BCHW" if channels_second else "BHWC"
    return replace(found, layout=layout) if found is not None else None


def _final_norm(trace: Trace, after: int, head: Site | None, model: str) -> Site | None:
    """The last normalisation between the last block and the classifier."""
    heads = {id(m) for m in head.modules} if head is not None else set()
    end = next((c.start for c in trace.calls if id(c.module) in heads), trace.root.stop)
    mixing = {id(c) for op in trace.attention_ops for c in (op.call, *op.call.ancestors()) if c is not trace.root}
    norms = [c for c in trace.calls if after < c.start < end and is_norm(c)]
    norms = [c for c in norms if not any(id(a) in mixing for a in c.ancestors())]  # not within attention pooling
    if not norms:
        return None
    dim = next((p.numel() for p in norms[-1].module.parameters()), norms[-1].width)
    return site("norm", norms[-1], norms[-1], dim, model, "BHWC")


def _head(model: nn.Module, trace: Trace, after: int, model_name: str) -> Site | None:
    """The classifier: as the model tells (timm's get_classifier), else the matrix that makes its logits."""
    told = _told_head(model, trace)
    if told is not None:
        return _head_site(told, model_name) if told else None
    logits = trace.root.output
    if logits is None:
        return None
    matrices = [c for c in trace.calls if c.start > after and c.has_matrix and c.output is not None]
    made = [c for c in matrices if c.output is logits]
    if not made:  # something is done behind it: as many outputs as there are logits
        outputs = [(c, c.output) for c in matrices if c.output is not None and c.output.shape[-1] == logits.shape[-1]]
        # or every token is classified, and one of them or their mean taken
        made = [c for c, y in outputs if y.ndim == 2] or [c for c, _ in outputs if not is_conv(c)]
    return _head_site([(made[-1].path, made[-1].module)], model_name) if made else None


def _given_head(model: nn.Module, path: str, name: str) -> Site:
    module = dict(model.named_modules()).get(path)
    if module is None or next(module.parameters(), None) is None:
        raise AttachError(f"head must be the path of a module of {name} with parameters, but is {path!r}")
    return _head_site([(path, module)], name)


def _beside_head(model: nn.Module, trace: Trace, after: int, head: Site | None) -> tuple[str, ...]:
    """Matrices behind the blocks that pooled features go through, but for the classifier; empty where a model tells."""
    if head is None or _told_head(model, trace) is not None:
        return ()
    own = {id(m) for bound in head.modules for m in bound.modules()}
    matrices = [c for c in trace.calls if c.start > after and c.has_matrix and id(c.module) not in own]
    return tuple(c.path for c in matrices if c.output is not None and c.output.ndim == 2)


def _head_site(heads: list[tuple[str, nn.Module]], model: str) -> Site:
    """One Site; a distilled model has two classifiers, which are its first and last module."""
    (path, first), (exit_path, last) = heads[0], heads[-1]
    dim = next((p.shape[1] for p in first.parameters() if p.ndim >= 2), 0)
    edges: Any = {"path": path, "enter": first, "exit_path": exit_path, "exit": last}
    return Site(role="head", dim=int(dim), layout="BNC", model=model, **edges)


def _told_head(model: nn.Module, trace: Trace) -> list[tuple[str, nn.Module]] | None:
    """The classifiers that the model names itself; empty if it was built without, None if it cannot tell."""
    paths = {id(m): name for name, m in model.named_modules()}
    for module in model.modules():
        tell: Any = getattr(module, "get_classifier", None)
        if callable(tell):
            told = tell()
            heads = told if isinstance(told, tuple | list) else (told,)
            known = [h for h in heads if isinstance(h, nn.Module) and id(h) in paths]
            found = [(paths[id(h)], h) for h in known if any(True for _ in h.parameters())]
            # a part without a classifier says nothing of the whole, nor one whose logits go on into another layer
            if module is model or (found and _is_last(trace, {id(h) for _, h in found})):
                return found
    return None


def _is_last(trace: Trace, heads: set[int]) -> bool:
    """Whether these are called, and no matrix is called behind them."""
    stop = max((c.stop for c in trace.calls if id(c.module) in heads), default=trace.root.stop)
    return stop < trace.root.stop and not any(c.start > stop and c.has_matrix for c in trace.calls)
