"""The tensors that an adapter depends on and does not change: the frozen backbone, and a classifier left as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from petune.injector.hooks.position_bias import REPLACED
from petune.injector.keys import named_parameters
from petune.injector.trainable import added_to, trainable_state_of
from petune.sites.site import Site, modules_of
from petune.sites.sites import Sites

TABLE_DTYPES = {torch.int64, torch.bool}
"""Buffers of these are indices and counters, which a library computes itself."""


def frozen_backbone(
    model: nn.Module, sites: Sites, name: str, own: Mapping[str, Tensor], *, train_head: bool
) -> dict[str, Tensor]:
    """Return the backbone's frozen parameters and buffers, sorted by state_dict key.

    Args:
        model: The model.
        sites: Its sites.
        name: The attachment; what later ones have trained in place is returned as it was before them.
        own: The tensors that the attachment saves.
        train_head: True if it trains the classifier, whose buffers then are not frozen.
    """
    head = sites.parts.get("head")
    in_head = {id(p) for module in head.modules for p in module.parameters()} if head is not None else set()
    skipped = {id(t) for t in own.values()} | in_head | added_to(model)
    # a task of AdapterBank that is not in use has another classifier at the same path
    head_keys = _head_keys(head, with_buffers=train_head)
    named: dict[str, Tensor] = {**named_parameters(model), **dict(model.named_buffers()), **_replaced_buffers(model)}
    frozen = {key: named[key] for key in sorted(named) if id(named[key]) not in skipped and key not in head_keys}
    return _before_later(model, name, frozen)


def frozen_head(model: nn.Module, sites: Sites, name: str, own: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Return the tensors of a classifier that the attachment does not train; None for a model without a classifier.

    Args:
        model: The model.
        sites: Its sites.
        name: The attachment, as for `frozen_backbone`.
        own: The tensors that it saves; `full` saves the statistics of a classifier with BatchNorm.
    """
    head = sites.parts.get("head")
    if head is None:
        return None
    named: dict[str, Tensor] = {}
    for path, module in head.named_modules:
        for key, tensor in (*module.named_parameters(), *module.named_buffers()):
            named[f"{path}.{key}"] = tensor
    saved = {id(t) for t in own.values()}
    return _before_later(model, name, {key: named[key] for key in sorted(named) if id(named[key]) not in saved})


def content_only(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return those tensors that say which backbone it is: without tables that a library makes itself.

    Those are buffers that are not saved with the model, and indices and counters (64-bit integers, booleans). From one
    version to the next, libraries add them, reshape them, or stop saving them. What they change in the output is seen
    in the reference logits.
    """
    buffers = dict(model.named_buffers(remove_duplicate=False))
    saved = {f"{path}.{name}".lstrip(".") for path, name in _saved_buffers(model)}

    def is_content(key: str, tensor: Tensor) -> bool:
        is_table = tensor.dtype in TABLE_DTYPES or key not in saved
        return key not in buffers or not is_table

    return {key: tensor for key, tensor in tensors.items() if is_content(key, tensor)}


def _saved_buffers(model: nn.Module) -> Iterator[tuple[str, str]]:
    for path, module in model.named_modules(remove_duplicate=False):
        for name in module._buffers:
            if name not in module._non_persistent_buffers_set:
                yield path, name


def block_owners(sites: Sites) -> dict[nn.Module, int]:
    """Return the index of the block that each module of a block belongs to; the first one for a shared module."""
    owners: dict[nn.Module, int] = {}
    for block in sites.all_blocks:
        for module in modules_of([block]):
            owners.setdefault(module, block.index)
    return owners


def block_indices(model: nn.Module, sites: Sites) -> dict[str, int]:
    """Return, by key, the index of the block that a tensor belongs to; those of no block are left out."""
    indices: dict[int, int] = {}
    for module, index in block_owners(sites).items():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            indices[id(tensor)] = min(index, indices.get(id(tensor), index))
    named: dict[str, Tensor] = {**named_parameters(model), **dict(model.named_buffers())}
    return {key: indices[id(tensor)] for key, tensor in named.items() if id(tensor) in indices}


def _head_keys(head: Site | None, *, with_buffers: bool) -> set[str]:
    keys: set[str] = set()
    for path, module in head.named_modules if head is not None else ():
        buffers = module.named_buffers() if with_buffers else ()
        keys |= {f"{path}.{key}" for key, _ in (*module.named_parameters(), *buffers)}
    return keys


def _replaced_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the own values of buffers that have another value while prompts are attached."""
    return {
        f"{path}.{key}": value
        for path, module in model.named_modules()
        for key, value in getattr(module, REPLACED, {}).items()
        if isinstance(value, Tensor)
    }


def _before_later(model: nn.Module, name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the values without those of later attachments, which are not there yet when this one is loaded."""
    state = trainable_state_of(model)
    if state is None or name not in state.attachments:
        return tensors
    return {key: state.values.value_before_later(name, key, tensor) for key, tensor in tensors.items()}
