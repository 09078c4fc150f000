"""Find out once for each kind of adapter whether rows of several can share a forward, by computing both ways."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from petune.base.errors import AttachError
from petune.serving.bank_kind import AdapterKind, AdapterValues, EditedModule, Owner
from petune.serving.row_values import can_stack

Features = Callable[[Sequence[Owner]], Tensor]
"""Maps the adapters of the first rows of a fixed batch to what enters the classifier."""

ROUNDING = 1e-3
"""Largest error of a mixed batch, as a part of the difference that another adapter makes."""
SCALES = (0.1, 1.0, 10.0)
"""Sizes of the changes of values that are tried until the outputs differ."""


def edited_modules(kind: AdapterKind, called: set[nn.Module]) -> list[EditedModule] | None:
    """Return the modules that compute something else for each adapter, but those of verbs.

    A tensor belongs to the nearest module around it that is called: attention may read the weights of its layers
    without calling them.

    Args:
        kind: The adapters.
        called: The modules that a forward calls.

    Returns:
        None if a tensor belongs to the whole model, or to nothing that can be exchanged for some rows.
    """
    model, log = kind.attachment.model, kind.log
    layers = [EditedModule(layer, kind.indices_in(layer), change) for layer, change in log.changed_layers.items()]
    in_holders = {index for indices in kind.slots_of_holder.values() for index in indices}
    done = in_holders | {index for edit in layers for index in edit.slots}
    parents = {child: parent for parent in model.modules() for child in parent.children()}
    unfrozen: dict[nn.Module, list[int]] = {}
    for index, slot in enumerate(kind.slots.slots):
        if index in done:
            continue
        owner: nn.Module | None = slot.owners[0][0]
        while owner is not None and owner not in called:
            owner = parents.get(owner)
        if owner is None or owner is model or len(slot.owners) > 1:
            return None
        unfrozen.setdefault(owner, []).append(index)
    names = {
        m: [name for i in slots for owner, name in kind.slots.slots[i].owners if owner is m]
        for m, slots in unfrozen.items()
    }
    own = [
        EditedModule(m, slots, None, names[m], len(names[m]) == len(slots) and can_stack(m, names[m]))
        for m, slots in unfrozen.items()
    ]
    return [*layers, *own]


def bypassed_modules(kind: AdapterKind, called: set[nn.Module]) -> set[nn.Module]:
    """Return the modules inside changed layers whose tensors the layer itself reads or replaces.

    Another kind cannot exchange these tensors for some of the rows while such a layer acts.

    Args:
        kind: The adapters.
        called: The modules that a forward with one of them calls with all of their own parameters.
    """
    layers = [layer for layer, change in kind.log.changed_layers.items() if change.addition is None]
    inside = {module for layer in layers for module in layer.modules() if module is not layer}
    return {module for module in inside if module not in called and any(True for _ in module.parameters(recurse=False))}


@contextlib.contextmanager
def recorded_calls(model: nn.Module) -> Iterator[set[nn.Module]]:
    """Yield the modules that are called inside the context with all of their own parameters.

    They are not recorded by hooks, which keep torch from its fused kernels.
    """
    called: set[nn.Module] = set()
    before = {module: module.__dict__.get("forward") for module in model.modules()}
    parameters = {module: set(module._parameters) for module in before}

    def recorder(module: nn.Module, own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if module._parameters.keys() >= parameters[module]:  # PEFT takes some out for the time of a call
                called.add(module)
            return own(*args, **kwargs)

        return forward

    try:
        for module in before:
            module.forward = recorder(module, module.forward)
        yield called
    finally:
        for module, own in before.items():
            if own is None:
                del module.forward
            else:
                module.forward = own


def can_share(owner: Owner, features: Features) -> bool:
    """Return True if a mixed batch computes for each row what its adapter computes alone.

    Batches of three and of two rows are tried, so that no other size is mistaken for the batch.
    """
    kind, values = owner
    assert kind is not None
    assert values is not None
    for scale in SCALES:
        other = Owner(kind, changed_values(values, scale))
        owners = [owner, other, owner if kind.sharing else Owner()]
        alone = [features([each] * 3) for each in owners]
        step = min(_largest(alone[0] - alone[1]), _largest(alone[1] - alone[2]))
        allowed = max(ROUNDING * step, 4 * torch.finfo(alone[0].dtype).eps * _largest(alone[0]))
        if step < 10 * allowed:
            continue
        try:
            orders = ([2, 0, 1], [1, 0])
            return all(
                _largest(features([owners[i] for i in order])[row] - alone[i][row]) <= allowed
                for order in orders
                for row, i in enumerate(order)
            )
        except AttachError:
            return False
    return False


def changed_values(values: AdapterValues, scale: float) -> AdapterValues:
    """Return other values, as another adapter of the kind could have."""
    generator = torch.Generator().manual_seed(0)

    def changed(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        noise = torch.randn(tensor.shape, generator=generator).to(tensor.device, tensor.dtype)
        size = scale * (float(tensor.detach().float().std(correction=0)) + 0.1)
        result = tensor.detach() + size * noise
        if bool((tensor >= 0).all()):
            result = result.abs()  # a variance stays one
        return nn.Parameter(result, requires_grad=False) if isinstance(tensor, nn.Parameter) else result

    return AdapterValues([changed(t) for t in values.tensors], values.head)


def _largest(x: Tensor) -> float:
    return float(x.detach().abs().max())
