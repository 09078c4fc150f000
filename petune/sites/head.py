"""Find the classifier of a model, and the layers next to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from petune.base.errors import AttachError
from petune.sites.layouts import is_conv
from petune.sites.site import Site
from petune.sites.trace import Call, Trace

NamedModules = Sequence[tuple[str, nn.Module]]


def find_head(model: nn.Module, trace: Trace, blocks_end: int) -> Site | None:
    """Return the classifier: what the model names (timm's get_classifier), else the matrix that makes its logits."""
    named = _named_by_model(model, trace)
    if named is not None:
        return _head_site(named, trace.model_name) if named else None
    call = _maker_of_logits(trace, blocks_end)
    return None if call is None else _head_site([(call.path, call.module)], trace.model_name)


def head_at(model: nn.Module, path: str) -> Site:
    """Return the module at `path` as the classifier.

    Raises:
        AttachError: There is no such module, or it has no parameters.
    """
    name, module = type(model).__name__, dict(model.named_modules()).get(path)
    if module is None or next(module.parameters(), None) is None:
        raise AttachError(f"head={path!r} is not a module of {name} with parameters. Give its dotted path")
    return _head_site([(path, module)], name)


def layers_beside_head(model: nn.Module, trace: Trace, blocks_end: int, head: Site | None) -> tuple[str, ...]:
    """Return paths of matrices after the blocks that pooled features go through, without the classifier.

    Empty if the model names its classifier itself.
    """
    if head is None or _named_by_model(model, trace) is not None:
        return ()
    own = {id(m) for bound in head.modules for m in bound.modules()}
    others = [c for c in _matrices_after(trace, blocks_end) if id(c.module) not in own]
    return tuple(c.path for c in others if c.output is not None and c.output.ndim == 2)


def _matrices_after(trace: Trace, time: int) -> list[Call]:
    return [c for c in trace.calls if c.start > time and c.has_matrix and c.output is not None]


def _maker_of_logits(trace: Trace, blocks_end: int) -> Call | None:
    """Return the last matrix that returns the logits; if they are processed further, the last with as many outputs."""
    logits = trace.root.output
    if logits is None:
        return None
    matrices = _matrices_after(trace, blocks_end)
    makers = [c for c in matrices if c.output is logits]
    if not makers:
        sized = [(c, y) for c in matrices if (y := c.output) is not None and y.shape[-1] == logits.shape[-1]]
        # every token may be classified, and one of them or their mean taken
        makers = [c for c, y in sized if y.ndim == 2] or [c for c, _ in sized if not is_conv(c)]
    return makers[-1] if makers else None


def _named_by_model(model: nn.Module, trace: Trace) -> NamedModules | None:
    """Return the classifiers that the model names itself; empty if it was built without, None if it names none."""
    paths = {id(m): path for path, m in model.named_modules()}
    for module in model.modules():
        get_classifier: Any = getattr(module, "get_classifier", None)
        if not callable(get_classifier):
            continue
        answer = get_classifier()
        heads = answer if isinstance(answer, tuple | list) else (answer,)
        own = [h for h in heads if isinstance(h, nn.Module) and id(h) in paths]
        named = [(paths[id(h)], h) for h in own if any(True for _ in h.parameters())]
        # a part without a classifier says nothing about the whole, nor one whose logits enter another layer
        if module is model or (named and _is_last(trace, {id(h) for _, h in named})):
            return named
    return None


def _is_last(trace: Trace, heads: set[int]) -> bool:
    """Return whether these modules are called, and no matrix is called after them."""
    stop = max((c.stop for c in trace.calls if id(c.module) in heads), default=trace.root.stop)
    return stop < trace.root.stop and not any(c.start > stop and c.has_matrix for c in trace.calls)


def _head_site(heads: NamedModules, model: str) -> Site:
    """Return one site; a distilled model has two classifiers, which are its first and last module."""
    (path, first), (exit_path, last) = heads[0], heads[-1]
    dim = next((p.shape[1] for p in first.parameters() if p.ndim >= 2), 0)
    return Site(
        role="head", path=path, enter=first, exit_path=exit_path, exit=last, dim=int(dim), layout="BNC", model=model
    )
