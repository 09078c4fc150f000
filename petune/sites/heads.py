"""All heads of a model: those that a user names, or those that are found, with modules of new weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from petune.sites.encoder import end_of
from petune.sites.heads_by_library import NamedModules
from petune.sites.heads_by_trace import head_at, head_site, predicting_modules, predicts_classes
from petune.sites.heads_by_user import HeadChoice, outermost
from petune.sites.layers_before_head import find_layers_before_head
from petune.sites.new_weights import new_weights, placed_in_blocks
from petune.sites.predictors import further_predictors, twin_predictors
from petune.sites.site import Block, Site, modules_in, modules_of
from petune.sites.towers_in_heads import without_towers
from petune.sites.trace import Trace


@dataclass(frozen=True)
class Heads:
    """The heads of a model.

    Attributes:
        site: All of them; None for a model without.
        layers_before: Paths of layers between backbone and heads.
        chosen: Paths of the heads, if other ones are found in the same model with other weights, or by default.
    """

    site: Site | None
    layers_before: tuple[str, ...]
    chosen: tuple[str, ...] | None


def find_heads(model: nn.Module, trace: Trace, blocks: Sequence[Block], choice: HeadChoice | None) -> Heads:
    """Return the heads that a user has chosen, or find them.

    Found are what predicts, and what a checkpoint did not fill: random weights are useless unless they train.
    """
    head = predicting_modules(model, trace, blocks) if choice is None else head_at(model, choice)
    new = _new_modules(model, blocks) if choice is None and head is not None else []
    if choice is None and head is not None:
        filled = outside_of(head_site(new, head.model), blocks) if new else blocks  # new encoders train
        head = without_towers(trace, filled, head)
    before = find_layers_before_head(model, trace, outside_of(head, blocks), head)
    if choice is None and head is not None and before and not predicts_classes(trace):
        head = _with(head, further_predictors(model, trace, head.modules, before, modules_of(blocks)))
    if choice is None and head is not None and predicts_classes(trace):
        head = _with(head, twin_predictors(trace, head.modules, end_of(trace, blocks)))
    known = modules_in([head]) if head is not None else set()
    is_extended = any(module not in known for _, module in new)
    if head is not None:
        head = _with(head, new)
        before = find_layers_before_head(model, trace, outside_of(head, blocks), head)
    is_chosen = head is not None and (choice is not None or is_extended)
    return Heads(
        head, before, tuple(path for path, _ in head.named_modules) if head is not None and is_chosen else None
    )


def outside_of(head: Site | None, blocks: Sequence[Block]) -> tuple[Block, ...]:
    """Return the blocks without those of a decoder that is a head: it trains as a whole."""
    inside = modules_in([head]) if head is not None else set()
    outside = (block for block in blocks if block.enter not in inside)
    return tuple(replace(block, index=index) for index, block in enumerate(outside))


def _new_modules(model: nn.Module, blocks: Sequence[Block]) -> NamedModules:
    """Return the modules that a checkpoint did not fill; none for a model with adapters, which no checkpoint fills."""
    has_adapters = any(hasattr(m, "is_petune_module") for m in model.modules())
    modules = [] if has_adapters else new_weights(model).modules
    placed = placed_in_blocks(blocks) if modules else set()
    return [(path, module) for path, module in modules if not placed >= {id(p) for p in module.parameters()}]


def _with(head: Site, others: NamedModules) -> Site:
    known = modules_in([head])
    further = [(path, module) for path, module in others if module not in known]
    return head_site(outermost([*head.named_modules, *further]), head.model) if further else head
