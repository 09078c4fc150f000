"""Find the parameters that a model's output depends on."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from petune.sites.forward import black_image, meta_inputs, meta_tensors, tensors_in
from petune.sites.hooked import removed_after
from petune.sites.input_spec import InputSpec
from petune.sites.returned import tensors_returned
from petune.sites.undisturbed import undisturbed

LOG = logging.getLogger(__name__)

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
            reached, _ = reached_on_meta(model, spec, candidates, [])
    except Exception:  # a constant tensor on another device, an op without a meta kernel, a value that is read
        LOG.debug("no gradients on the meta device; a real forward follows", exc_info=True)
        with undisturbed(model), torch.enable_grad(), _gradients_for(candidates):
            reached = leaves_of(tensors_returned(black_image(model, spec).call(model)))
    if reached is None:
        return candidates
    return [p for p in candidates if id(p) in reached]


def parameters_after(
    model: nn.Module, spec: InputSpec, modules: Iterable[nn.Module], *, training: bool = False
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the parameters that act after `modules` or in them, and those that act nowhere.

    The first are those that the output depends on, and no input of `modules`. Both are empty if the model does not run
    like that.

    Args:
        model: Modes, flags and random state are as before afterwards.
        spec: What it takes.
        modules: Such as all blocks.
        training: Run the forward in train mode, on the meta device only.
    """
    candidates = [p for p in model.parameters() if p.is_floating_point()]
    entered: list[Tensor] = []

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        entered.extend(tensors_in((args, kwargs)))

    handles = [module.register_forward_pre_hook(enter, with_kwargs=True) for module in modules]
    try:
        with removed_after(handles):
            return _after(model, spec, candidates, entered, training=training)
    except Exception:  # a value that is read, batch statistics of one image
        LOG.debug("no forward tells which parameters act after the blocks", exc_info=True)
        return [], []


def _after(
    model: nn.Module, spec: InputSpec, parameters: list[nn.Parameter], entered: list[Tensor], *, training: bool
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    try:
        with undisturbed(model), torch.enable_grad():
            for module in model.modules():
                module.training = training
            reached, before = reached_on_meta(model, spec, parameters, entered)
    except Exception:
        if training:
            raise
        entered.clear()
        with undisturbed(model), torch.enable_grad(), _gradients_for(parameters):
            reached = leaves_of(tensors_returned(black_image(model, spec).call(model)))
            before = _leaves_before(entered)
    if reached is None or before is None:
        return [], []
    after = [p for p in parameters if id(p) in reached - before]
    return after, [p for p in parameters if id(p) not in reached | before]


def _leaves_before(entered: list[Tensor]) -> set[int] | None:
    """Return the leaves that tensors depend on, which may be parameters themselves."""
    leaves = leaves_of(entered)
    return None if leaves is None else leaves | {id(x) for x in entered}


def reached_on_meta(
    model: nn.Module, spec: InputSpec, parameters: list[nn.Parameter], entered: list[Tensor]
) -> tuple[set[int] | None, set[int] | None]:
    """Return the parameters that the output depends on, and those that the tensors depend on that a hook collects."""
    wanted, tensors, originals = {id(p) for p in parameters}, meta_tensors(model), {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        if path in tensors and id(parameter) in wanted:
            originals[id(tensors[path].requires_grad_(True))] = id(parameter)
    inputs = meta_inputs(model, spec)
    outputs = functional_call(model, tensors, inputs.args, dict(inputs.kwargs), tie_weights=False)
    every = (leaves_of(tensors_returned(outputs)), _leaves_before(entered))
    reached, before = (None if of is None else {originals[leaf] for leaf in of if leaf in originals} for of in every)
    return reached, before


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
    nodes = nodes_of(outputs)
    if any(node.name() == REENTRANT_CHECKPOINT for node in nodes):
        return None
    return {id(node.variable) for node in nodes if hasattr(node, "variable")}


def nodes_of(outputs: Iterable[Tensor]) -> set[Any]:
    """Return the nodes of the outputs' graph."""
    nodes: list[Any] = [y.grad_fn for y in outputs]
    visited: set[Any] = {None}
    while nodes:
        node = nodes.pop()
        if node not in visited:
            visited.add(node)
            nodes += [following for following, _ in node.next_functions]
    return visited - {None}
