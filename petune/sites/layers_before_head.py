"""Find the layers between a backbone and its heads. They count as backbone, so they are named to the user."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set

from torch import nn

from petune.sites.encoder import attends_to_others, encoder_of, end_of, start_of
from petune.sites.heads_by_library import classifiers_of, holds_matrix
from petune.sites.heads_by_trace import predicts_classes
from petune.sites.site import Block, Site, modules_in
from petune.sites.trace import Trace

Condition = Callable[[nn.Module], bool]


def find_layers_before_head(
    model: nn.Module, trace: Trace, blocks: Sequence[Block], head: Site | None
) -> tuple[str, ...]:
    """Return paths of layers with a matrix between backbone and heads: layers for pooled features, necks, decoders.

    Empty if the model names its classifier by `get_classifier`.
    """
    if head is None or classifiers_of(model) is not None:
        return ()
    own = modules_in([head])
    if predicts_classes(trace):
        end = end_of(trace, blocks)
        after = [c for c in trace.calls if c.start > end and c.has_matrix and c.module not in own]
        return tuple(dict.fromkeys(c.path for c in after if c.output is not None and c.output.ndim == 2))
    in_backbone = _backbone_test(model, trace, blocks)
    tensors = {id(p) for bound in head.modules for p in bound.parameters()}
    return tuple(_outermost(model, "", lambda m: m in own or _has_only(m, tensors) or in_backbone(m)))


def _has_only(module: nn.Module, tensors: Set[int]) -> bool:
    """Return whether a layer's own parameters are all among `tensors`: a second module with a head's parameters."""
    own = [id(p) for p in module.parameters(recurse=False)]
    return bool(own) and set(own) <= tensors


def _backbone_test(model: nn.Module, trace: Trace, blocks: Sequence[Block]) -> Condition:
    """Return a function that says if a layer belongs to a backbone: a model of another configuration inside this one.

    Without such models, to the backbone belong the encoder's blocks, and what is called before the last of them ends.
    """
    inside = {id(m) for inner in _inner_backbones(model, trace) for m in inner.modules()}
    if inside:
        return lambda module: id(module) in inside
    decoder = [block for block in blocks if any(attends_to_others(c) for c in trace.calls if c.module is block.enter)]
    encoder = [block for block in blocks if block not in decoder]
    start, end = start_of(trace, blocks), end_of(trace, encoder or blocks)
    in_encoder = encoder_of(trace, blocks) | {id(m) for m in modules_in(encoder)}
    in_decoder = {id(m) for m in modules_in(decoder)}
    limit = end if encoder else start
    called = {id(c.module) for c in trace.calls if c.start < limit and (c.stop <= limit or c.is_leaf)}
    return lambda module: id(module) in in_encoder or (id(module) in called and id(module) not in in_decoder)


def _inner_backbones(model: nn.Module, trace: Trace) -> list[nn.Module]:
    """Return the transformers models with another configuration that read no other: the backbones of a detector.

    There may be one for images and one for texts (Grounding DINO); MaskFormer's decoder reads what the backbone made.
    """
    own = type(getattr(model, "config", None))
    calls = [c for c in trace.calls if hasattr(c.module, "base_model_prefix")]
    calls = [c for c in calls if type(getattr(c.module, "config", None)) is not own]
    outermost = [c for c in calls if not any(c is not other and c.within(other) for other in calls)]
    starts = [c.start for c in outermost]
    sources = trace.flow.sources(dict(zip(starts, starts, strict=True)), starts)
    return [c.module for c in outermost if not sources.get(c.start)]


def _outermost(module: nn.Module, path: str, is_known: Condition) -> list[str]:
    """Return the paths of the largest modules without a known layer, that have a matrix."""
    if not holds_matrix(module) or (is_known(module) and _is_layer(module)):
        return []
    layers = [m for m in module.modules() if _is_layer(m)]
    if path and not any(is_known(m) for m in layers):
        return [path]
    children = [(f"{path}.{name}" if path else name, child) for name, child in module.named_children()]
    return [found for name, child in children for found in _outermost(child, name, is_known)]


def _is_layer(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))
