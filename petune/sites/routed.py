"""Find modules that a forward calls for some inputs only: experts, of which a router chooses some for each token."""

from __future__ import annotations

from collections.abc import Iterator, Set

from torch import nn

from petune.sites.forward import meta_output
from petune.sites.input_spec import InputSpec
from petune.sites.recorder import record_calls


def routed_modules(model: nn.Module, spec: InputSpec, blocks: Set[nn.Module]) -> dict[nn.Module, nn.Module]:
    """Return modules that another input would call, each with its like in a sibling of the same class that is called.

    A forward that runs without values, on the meta device, chooses nothing by values: then there are none.

    Args:
        model: Modes and random state are as before afterwards.
        spec: What it takes.
        blocks: Modules that are no alternatives of each other, with whatever holds them.
    """
    try:
        meta_output(model, spec, 2)
        return {}
    except Exception:  # values are read
        calls = record_calls(model, spec, model.modules())
    pairs = [pair for idle, sibling in _experts(model, calls.keys(), blocks) for pair in _pairs(idle, sibling)]
    return {module: other for module, other in pairs if other in calls}


def routed_parameters(model: nn.Module, spec: InputSpec, blocks: Set[nn.Module]) -> set[int]:
    """Return identities of the parameters of all experts, of which one batch may reach a few only."""
    routed = routed_modules(model, spec, blocks)
    return {id(p) for pair in routed.items() for module in pair for p in module.parameters(recurse=False)}


def _experts(model: nn.Module, called: Set[nn.Module], blocks: Set[nn.Module]) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Yield pairs of children of one module, of one class: one in which nothing is called, and one that is used."""
    active = {m for m in model.modules() if not called.isdisjoint(m.modules())}
    whole = {m for m in model.modules() if not blocks.isdisjoint(m.modules())}
    for parent in model.modules():
        children = [*parent.children()] if parent in active else []
        is_list = isinstance(parent, nn.ModuleList | nn.ModuleDict)
        for child in children:
            # a single layer next to others, such as v next to q and k, may be one whose weights are read
            if child in active or child in whole or not (is_list or any(child.children())):
                continue
            same = (c for c in children if c in active and c not in whole and type(c) is type(child))
            yield from ((child, other) for other in same)


def _pairs(idle: nn.Module, sibling: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    inside = dict(sibling.named_modules())
    yield from ((m, inside[path]) for path, m in idle.named_modules() if path in inside)
