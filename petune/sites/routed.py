"""Find modules that a forward calls for some inputs only: experts, of which a router chooses some for each token."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Set
from typing import Any

from torch import nn

from petune.sites.forward import forward_of, meta_output
from petune.sites.hooked import removed_after
from petune.sites.input_spec import Inputs, InputSpec
from petune.sites.recorder import record_calls

LOG = logging.getLogger(__name__)

PROBES = ((1.0, 0.0), (4.0, 0.0), (1.0, 4.0), (1.0, -4.0))
"""Scales and shifts of noise that routers are tried on."""
_TENSORS = (nn.ParameterDict, nn.ParameterList)


def routed_modules(model: nn.Module, spec: InputSpec, blocks: Set[nn.Module]) -> dict[nn.Module, nn.Module]:
    """Return modules that another input would call, each with its like in a sibling of the same class that is called.

    A forward that runs without values, on the meta device, chooses nothing by values: then there are none.

    Args:
        model: Modes and random state are as before afterwards.
        spec: What it takes.
        blocks: Modules that are no alternatives of each other, with whatever holds them.
    """
    return dict(_routed_pairs(model, spec, blocks))


def routed_parameters(model: nn.Module, spec: InputSpec, blocks: Set[nn.Module]) -> set[int]:
    """Return identities of the parameters of all experts, of which one batch may reach a few only."""
    pairs = _routed_pairs(model, spec, blocks)
    return {id(p) for pair in pairs for module in pair for p in module.parameters(recurse=False)}


def _routed_pairs(model: nn.Module, spec: InputSpec, blocks: Set[nn.Module]) -> list[tuple[nn.Module, nn.Module]]:
    """Return the pairs of `routed_modules`, each module with its like in all siblings that are called."""
    try:
        meta_output(model, spec, 2)
        return []
    except Exception:  # values are read
        LOG.debug("no forward on the meta device; experts are looked for", exc_info=True)
        calls = record_calls(model, spec, model.modules())
    pairs = [pair for idle, sibling in _experts(model, calls.keys(), blocks) for pair in _pairs(idle, sibling)]
    # PEFT keeps AdaLoRA's tensors in containers, which no forward calls
    return [(module, other) for module, other in pairs if other in calls or isinstance(other, _TENSORS)]


def unchosen_modules(model: nn.Module, spec: InputSpec, blocks: Set[nn.Module]) -> set[nn.Module]:
    """Return those of `routed_modules` of which nothing shows that an input chooses them.

    Of their siblings the same ones are called for black images, for noise and for bright and dark noise: a router may
    choose others for other images, but these may also be modules that no forward ever calls.
    """
    if not routed_modules(model, spec, blocks):
        return set()
    probes = [_called(model, spec.zeros())]
    for seed, (scale, shift) in enumerate(PROBES):
        noise = spec.noise(1, seed)
        content = noise.map(lambda x, a=scale, b=shift: a * x + b if x.is_floating_point() else x)  # type: ignore[misc]
        with contextlib.suppress(Exception):  # whatever the model's own code raises on noise
            probes.append(_called(model, content))
    unchosen: set[nn.Module] = set()
    idle = {child for child, _ in _experts(model, probes[0], blocks)}
    for parent in model.modules():
        children = [child for child in parent.children() if child in idle]
        siblings = {frozenset(c for c in parent.children() if _is_called(c, called)) for called in probes}
        if len(siblings) == 1:
            unchosen |= {m for child in children for m in child.modules()}
    return unchosen


def _called(model: nn.Module, inputs: Inputs) -> set[nn.Module]:
    called: set[nn.Module] = set()

    def enter(module: nn.Module, args: Any) -> None:
        called.add(module)

    handles = [module.register_forward_pre_hook(enter) for module in model.modules()]
    with removed_after(handles):
        forward_of(model, inputs)
    return called


def _is_called(module: nn.Module, called: Set[nn.Module]) -> bool:
    return not called.isdisjoint(module.modules())


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
