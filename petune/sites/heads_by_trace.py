"""Find the heads of a model: the layers that compute its predictions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from petune.sites.encoder import encoder_of, end_of, last_residual, outermost_after, start_of
from petune.sites.heads_by_library import NamedModules, classifiers_of, named_by_library
from petune.sites.heads_by_user import HeadChoice, outermost, resolve_heads
from petune.sites.layouts import is_conv
from petune.sites.norms import is_norm
from petune.sites.predictors import is_read
from petune.sites.site import Block, Site, modules_in
from petune.sites.trace import Call, Trace


def predicting_modules(model: nn.Module, trace: Trace, blocks: Sequence[Block]) -> Site | None:
    """Return the heads as one site, or None for a model without.

    For a model that returns logits (B, classes) they are what the model's library names as such, else the matrix that
    makes the logits, with the layers before it that take one row for each image. For a model that predicts more than
    that for an image (boxes, masks, a depth map), they are what its library names, and every module after the last
    block.
    """
    heads = named_by_library(model, trace, start_of(trace, blocks))
    end = end_of(trace, blocks)
    if heads is None and predicts_classes(trace):
        heads = _makers_of_logits(trace, blocks, end)
        if heads and any(y.ndim > 2 and not _is_feature(trace, y, blocks) for y in trace.outputs):
            heads = outermost([*heads, *_after_blocks(model, trace, blocks, end)])
    elif not predicts_classes(trace) and classifiers_of(model) is None:
        heads = outermost([*(heads or []), *_after_blocks(model, trace, blocks, end)])
    return head_site(heads, trace.model_name) if heads else None


def head_at(model: nn.Module, choice: HeadChoice) -> Site:
    """Return the chosen modules as the heads; see `resolve_heads`."""
    return head_site(resolve_heads(model, choice), type(model).__name__)


def predicts_classes(trace: Trace) -> bool:
    """Return whether the model returns logits (B, classes), and nothing like boxes or masks, nor a loss."""
    return trace.root.output is None or 1 <= trace.root.output.ndim <= 2


def _makers_of_logits(trace: Trace, blocks: Sequence[Block], blocks_end: int) -> NamedModules:
    """Return the layers that return the logits of an image; of a model for several tasks or towers, those of all.

    If the logits are processed further, the last matrix with as many outputs; or two whose outputs are added.
    """
    logits = trace.root.output
    if logits is None or (logits.ndim == 2 and len(logits) != trace.batch_size):
        return []  # (tokens, width): features of a model that has no row for each image
    every = [c for c in trace.calls if c.has_matrix and c.output is not None]
    matrices = [c for c in every if c.start > blocks_end]
    makers = [c for c in matrices if c.output is logits][-1:] or _sized_like(trace, matrices, logits)
    in_blocks = modules_in(blocks)
    rows = {id(y) for y in (logits, *trace.outputs) if y.ndim == 2 and len(y) == trace.batch_size}
    others = [c for c in every if id(c.output) in rows and c.module not in in_blocks]
    others = [c for c in others if not is_read(trace, c)]
    if not makers and not any(c.output is logits for c in others):
        return []  # features, such as those of CLIP's towers, next to logits that no layer made
    return outermost([_with_layers_before(trace, c) for c in (*makers, *others)])


def _with_layers_before(trace: Trace, maker: Call) -> tuple[str, nn.Module]:
    """Return the largest module that takes a row for each image and returns what the matrix does, such as an MLP."""
    head = maker
    for around in maker.ancestors():
        x = around.input
        is_of_rows = x is not None and x.ndim == 2 and len(x) == trace.batch_size and around.output is maker.output
        if is_of_rows and around.parent is not None and sum(c.has_matrix for c in around.subtree()) > 1:
            head = around
    return head.path, head.module


def _sized_like(trace: Trace, matrices: list[Call], logits: Tensor) -> list[Call]:
    is_number = logits.ndim == 1 and len(logits) == trace.batch_size  # one for each image: (B, 1) without its last axis
    width = 1 if is_number else logits.shape[-1]
    sized = [(c, y) for c in matrices if (y := c.output) is not None and y.shape[-1] == width]
    of_images = [c for c, y in sized if y.ndim == 2 and len(y) == trace.batch_size]
    for add in trace.additions:
        added = [c for c in of_images if any(c.output is operand for operand in add.operands)]
        if len(added) > 1:  # a distilled model returns the mean of two
            return added
    # every token may be classified, and one of them or their mean taken
    of_tokens = [c for c, y in sized if y.ndim > 2 and not is_conv(c)]
    # or every frame of a video, folded into the batch
    of_frames = [c for c, y in sized if y.ndim == 2 and trace.batch_size and len(y) % trace.batch_size == 0]
    # or every place of a map, by a convolution
    of_maps = [c for c in matrices if is_conv(c) and c.output is not None and c.output.ndim == 4]
    of_maps = [c for c in of_maps if c.output is not None and c.output.shape[1] == width]
    return (of_images or of_tokens or of_frames or of_maps)[-1:]


def _after_blocks(model: nn.Module, trace: Trace, blocks: Sequence[Block], blocks_end: int) -> NamedModules:
    """Return the outermost modules with a matrix after the last block; empty if the model returns features."""
    if trace.root.output is None or _is_feature(trace, trace.root.output, blocks):
        return []
    outermost = outermost_after(trace, blocks_end)
    encoder = encoder_of(trace, blocks)
    outermost = [c for c in outermost if id(c.module) not in encoder] or outermost
    return list(dict(_list_of(model, c, blocks) for c in outermost).items())


def _is_feature(trace: Trace, y: Tensor, blocks: Sequence[Block]) -> bool:
    """Return whether a tensor is what a block or the final norm returns, or a residual around all blocks."""
    residual = last_residual(trace, blocks)
    if residual is not None and residual.result is y:
        return True
    bounds = {id(m) for block in blocks for m in block.modules}
    makers = [c for c in trace.calls if c.output is y and c is not trace.root]
    innermost = max(makers, key=lambda c: c.start, default=None)
    return any(id(c.module) in bounds for c in makers) or (innermost is not None and is_norm(innermost))


def _list_of(model: nn.Module, call: Call, blocks: Sequence[Block]) -> tuple[str, nn.Module]:
    """Return the list that a module is in, such as the predictors of all decoder layers; else the module."""
    path = call.path.rpartition(".")[0]
    parent = model.get_submodule(path)
    alike = all(type(m) is type(call.module) for m in parent.children())
    within = {id(m) for m in parent.modules()}
    is_list = isinstance(parent, nn.ModuleList) and alike and not any(id(b.enter) in within for b in blocks)
    return (path, parent) if is_list else (call.path, call.module)


def head_site(heads: NamedModules, model: str) -> Site:
    """Return one site for all heads: a distilled model has two classifiers, a detector predicts classes and boxes."""
    (path, first), *others = heads
    exit_path, last = others.pop() if others else (path, first)
    # weight_norm keeps lengths as (outputs, 1)
    dim = next((p.shape[1] for p in first.parameters() if p.ndim >= 2 and p.shape[1] > 1), 0)
    ends = {"path": path, "enter": first, "exit_path": exit_path, "exit": last}
    return Site(role="head", dim=int(dim), layout="BNC", model=model, further=tuple(others), **ends)  # type: ignore[arg-type]
