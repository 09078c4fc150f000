"""Find the parameters that a model's output depends on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from petune.sites.forward import black_image, meta_inputs, meta_tensors, tensors_in
from petune.sites.input_spec import InputSpec
from petune.sites.undisturbed import undisturbed

REENTRANT_CHECKPOINT = "CheckpointFunctionBackward"
"""The node of torch's reentrant gradient checkpointing, which hides the parameters inside."""


def used_parameters(model: nn.Module, spec: InputSpec, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Return those of `parameters` that the output depends on: the ones that a gradient reaches.

    A layer that is never called is left out, and one whose output is not used (a pooler next to the classifier).
    The graph of one forward in eval mode decides, without a backward pass: on the meta device if possible, else of a
    black image. If gradient checkpointing hides the parameters, all are returned.

    Args:
        model: Modes, flags and random state are as before afterwards.
        spec: What it takes.
        parameters: Floating-point parameters of the model.
    """
    candidates = list(parameters)
    try:
        with undisturbed(model), torch.enable_grad():
            reached = _reached_on_meta(model, spec, candidates)
    except Exception:  # a constant tensor on another device, an op without a meta kernel, a value that is read
        with undisturbed(model), torch.enable_grad(), _gradients_for(candidates):
            reached = leaves_of(tensors_in(black_image(model, spec).call(model)))
    if reached is None:
        return candidates
    return [p for p in candidates if id(p) in reached]


def _reached_on_meta(model: nn.Module, spec: InputSpec, parameters: list[nn.Parameter]) -> set[int] | None:
    wanted, tensors, originals = {id(p) for p in parameters}, meta_tensors(model), {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        if path in tensors and id(parameter) in wanted:
            originals[id(tensors[path].requires_grad_(True))] = id(parameter)
    inputs = meta_inputs(model, spec)
    leaves = leaves_of(tensors_in(functional_call(model, tensors, inputs.args, dict(inputs.kwargs), tie_weights=False)))
    return None if leaves is None else {originals[leaf] for leaf in leaves if leaf in originals}


@contextlib.contextmanager
def _gradients_for(parameters: list[nn.Parameter]) -> Iterator[None]:
    flags = [p.requires_grad for p in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.requires_grad_(flag)


def leaves_of(outputs: Iterable[Tensor]) -> set[int] | None:
    """Return the identities of the leaves of the outputs' graph; None if checkpointing hides some."""
    nodes: list[Any] = [y.grad_fn for y in outputs]
    visited: set[Any] = {None}
    leaves: set[int] = set()
    while nodes:
        node = nodes.pop()
        if node in visited:
            continue
        if node.name() == REENTRANT_CHECKPOINT:
            return None
        visited.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        nodes += [following for following, _ in node.next_functions]
    return leaves
