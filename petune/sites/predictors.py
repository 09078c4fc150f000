"""Find further heads: layers that predict besides those that the library names, such as a detector's first guesses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set
from typing import Any

from torch import nn

from petune.sites.heads_by_library import NamedModules, holds_matrix
from petune.sites.heads_by_user import outermost
from petune.sites.trace import Call, Trace


def further_predictors(
    model: nn.Module, trace: Trace, heads: Sequence[nn.Module], others: Iterable[str], in_blocks: Set[nn.Module]
) -> NamedModules:
    """Return those of the layers between backbone and heads that predict, too.

    These are the ones whose predictions for every token the model returns next to those of its heads, and the ones that
    are built as a head is (RT-DETR picks its queries by a second classifier).

    Args:
        model: The model.
        trace: Its forward.
        heads: The heads that are known.
        others: Paths of the layers between backbone and heads.
        in_blocks: The modules of blocks, in which nothing predicts, even if it is built as a head is by chance.
    """
    layers = [(path, model.get_submodule(path)) for path in others]
    every = ((f"{path}.{name}".rstrip("."), m) for path, layer in layers for name, m in layer.named_modules())
    inside = [(path, m) for path, m in every if m not in in_blocks]
    returning = {id(c.module) for c in _returned_for_tokens(trace)}
    found = outermost([(path, m) for path, m in inside if id(m) in returning])
    built = [_build_of(head) for head in _single(heads) if _changes_width(head)]
    built += [_build_of(m) for _, m in found if _changes_width(m)]
    return outermost([*found, *((path, m) for path, m in inside if holds_matrix(m) and _build_of(m) in built)])


def twin_predictors(trace: Trace, heads: Iterable[nn.Module], blocks_end: int) -> NamedModules:
    """Return layers after the blocks that are built as a classifier is, and whose outputs no layer reads.

    The logits depend on them, too: VOLO adds the maximum over its tokens of a second classifier.
    """
    built = [_build_of(head) for head in _single(heads) if _changes_width(head)]
    inside = {id(m) for head in heads for m in head.modules()}
    later = (c for c in trace.calls if c.start > blocks_end and c.has_matrix and id(c.module) not in inside)
    return [(c.path, c.module) for c in later if _build_of(c.module) in built and not is_read(trace, c)]


def have_twins(model: nn.Module, heads: Iterable[nn.Module]) -> bool:
    """Return whether other modules of a model are built as its classifiers are, so that they may be classifiers."""
    built = [_build_of(head) for head in _single(heads) if _changes_width(head)]
    inside = {m for head in heads for m in head.modules()}
    return any(_build_of(m) in built for m in model.modules() if m not in inside)


def is_read(trace: Trace, call: Call) -> bool:
    """Return whether a later module with a matrix is called with what a call returned."""
    later = (c for c in trace.calls if c.start > call.stop and holds_matrix(c.module))
    return any(x is call.output for c in later for x in c.inputs)


def _returned_for_tokens(trace: Trace) -> Iterator[Call]:
    """Yield the calls that map tokens to another width, with nothing after them but an addition.

    What maps numbers of words to tokens is a tower, such as that of the text in OWL-ViT.
    """
    returned = {id(y) for y in trace.outputs}
    returned |= {id(x) for add in trace.additions if id(add.result) in returned for x in add.operands}
    for call in trace.calls:
        y = call.output
        if y is None or id(y) not in returned or y.ndim != 3 or not holds_matrix(call.module) or call.parent is None:
            continue
        of_tokens = call.maps_tokens and call.input is not None and call.input.is_floating_point()
        if of_tokens and y.shape[-1] != call.width and not is_read(trace, call):
            yield call


def _single(heads: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Yield heads, and the items of lists of heads."""
    for head in heads:
        if isinstance(head, nn.ModuleList | nn.ModuleDict):
            yield from _single(head.children())
        else:
            yield head


def _build_of(module: nn.Module) -> tuple[Any, ...]:
    """Return the type and the shapes of the parameters of a module."""
    return (type(module), *((name, tuple(p.shape)) for name, p in module.named_parameters()))


def _changes_width(head: nn.Module) -> bool:
    """Return whether the outputs of a head, by its last matrix, have another width than its inputs."""
    matrices = [p for p in head.parameters() if p.ndim >= 2]
    return bool(matrices) and matrices[-1].shape[0] != matrices[0].shape[1]
