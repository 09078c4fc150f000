"""Read from a model which of its modules are heads: timm's `get_classifier`, transformers' `base_model_prefix`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from petune.sites.trace import Trace

NamedModules = Sequence[tuple[str, nn.Module]]


def classifiers_of(module: nn.Module) -> list[nn.Module] | None:
    """Return the classifiers that `get_classifier()` of a module returns, each once.

    Returns:
        Empty if the model was built without a classifier; None if there is no such method, or it raises, as that of a
        base class that was meant to be overridden does.
    """
    get_classifier: Any = getattr(module, "get_classifier", None)
    if not callable(get_classifier):
        return None
    try:
        answer = get_classifier()
    except Exception:  # whatever a model's own code raises
        return None
    return list(dict.fromkeys(_modules_in(answer)))


def named_by_library(model: nn.Module, trace: Trace, blocks_start: int) -> NamedModules | None:
    """Return the heads that the model names itself; empty if it was built without, None if it names none."""
    paths = {id(m): path for path, m in model.named_modules()}
    named = _named_by_method(model, trace, paths)
    if named is not None:
        return named
    for module in model.modules():
        heads = [h for h in _outside_of_base(module) if not _is_before(trace, h, blocks_start)]
        if heads and _are_last(trace, heads):
            return [(paths[id(h)], h) for h in map(_narrowed, heads)]
    return None


def holds_matrix(module: nn.Module) -> bool:
    """Return whether a module has a weight matrix or kernel, which a norm has not."""
    return any(p.ndim >= 2 for p in module.parameters())


def _named_by_method(model: nn.Module, trace: Trace, paths: Mapping[int, str]) -> NamedModules | None:
    for module in model.modules():
        classifiers = classifiers_of(module)
        if classifiers is None:
            continue
        own = [h for h in classifiers if id(h) in paths and next(h.parameters(), None) is not None]
        # a part without a classifier says nothing about the whole, nor one whose logits enter another layer
        if module is model or (own and _are_last(trace, own)):
            return [(paths[id(h)], h) for h in own]
    return None


def _modules_in(value: Any) -> Iterator[nn.Module]:
    """Yield the modules in nested containers; a list of modules is never called itself, its items are."""
    if isinstance(value, nn.ModuleDict | Mapping):
        value = list(value.values())
    if isinstance(value, nn.ModuleList | tuple | list):
        for item in value:
            yield from _modules_in(item)
    elif isinstance(value, nn.Module):
        yield value


def _outside_of_base(module: nn.Module) -> list[nn.Module]:
    """Return the modules of a transformers model for a task that its base model does not have: the new heads.

    A norm alone is left out: it is the final norm.
    """
    prefix = getattr(module, "base_model_prefix", None)
    base = module._modules.get(prefix) if isinstance(prefix, str) and prefix else None
    if base is None:
        return []
    outside = [child for child in module.children() if child is not base]
    return [head for child in outside for head in _modules_in(child) if holds_matrix(head)]


def _is_before(trace: Trace, module: nn.Module, time: int) -> bool:
    """Return whether a module is called, and only before that time, as an embedding is."""
    inside = {id(m) for m in module.modules()}
    stops = [c.stop for c in trace.calls if id(c.module) in inside]
    return bool(stops) and max(stops) < time


def _are_last(trace: Trace, heads: Iterable[nn.Module]) -> bool:
    """Return whether these modules are called, and no other matrix is called after them."""
    inside = {id(m) for head in heads for m in head.modules()}
    stop = max((c.stop for c in trace.calls if id(c.module) in inside), default=trace.root.stop)
    return stop < trace.root.stop and not any(c.start > stop and c.has_matrix for c in trace.calls)


def _narrowed(module: nn.Module) -> nn.Module:
    """Return the layer that has all tensors of a module, such as the linear layer after an nn.Flatten."""
    children = list(module.children())
    tensors = len(module.state_dict())
    inner = next((c for c in children if len(c.state_dict()) == tensors), None)
    return module if inner is None or isinstance(inner, nn.ModuleList | nn.ModuleDict) else _narrowed(inner)
