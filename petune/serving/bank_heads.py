"""Classifiers of an adapter bank: built for an adapter's classes, filled with its values.

Shapes: B batch, D width of what enters the classifier.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from petune.adapters.format import SavedAdapter
from petune.base.errors import BackboneMismatch
from petune.serving.bank_kind import Slot, as_value, like
from petune.sites.site import Site


class CaptureInput(nn.Module):
    """Takes the place of the classifier and records what enters it."""

    captured: Tensor

    def forward(self, x_BD: Tensor) -> Tensor:
        """Return the input unchanged."""
        self.captured = x_BD
        return x_BD


def head_for(site: Site, saved: SavedAdapter) -> nn.Module:
    """Copy a classifier, with as many classes as a saved adapter has."""
    keys = head_keys(saved, site)
    head = copy.deepcopy(site.enter)
    for path, module in list(head.named_modules()):
        if not isinstance(module, nn.Linear):
            continue
        key = keys.get(".".join(filter(None, (path, "weight"))))
        if key is None or len(saved.tensors[key]) == module.out_features:
            continue
        num_classes, width = saved.tensors[key].shape
        weight, has_bias = module.weight, module.bias is not None
        resized = nn.Linear(width, num_classes, has_bias, device=weight.device, dtype=weight.dtype)
        if path:
            head.set_submodule(path, resized)
        else:
            head = resized
    return head


def traces_at(head: nn.Module) -> list[Any]:
    """Return what changes when an adapter is put at a classifier: its hooks, modules, tensors and functions."""
    return [
        (
            id(module),
            type(module),
            sorted(module.__dict__),
            [len(hooks) for name, hooks in sorted(module.__dict__.items()) if name.endswith("_hooks")],
            [(name, id(tensor)) for name, tensor in (*module._parameters.items(), *module._buffers.items())],
        )
        for module in head.modules()
    ]


def check_same_head(site: Site, saved: SavedAdapter) -> None:
    """Check that an adapter was trained with the head that a bank exchanges.

    Raises:
        BackboneMismatch: It has other heads.
    """
    named = (saved.config.get("chosen_sites") or {}).get("head")
    heads = [named] if isinstance(named, str) else named
    if heads and heads != [site.path]:
        raise BackboneMismatch(
            f"{saved.path} was trained with head={', '.join(heads)}, and a bank of this model exchanges {site.path} "
            "alone. Load it with petune.load"
        )


def head_slots(head: nn.Module) -> dict[str, Slot]:
    """Return the tensors of a classifier by their names in it."""
    slots: dict[str, Slot] = {}
    for path, module in head.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and name not in module._non_persistent_buffers_set:
                slots[".".join(filter(None, (path, name)))] = Slot(tensor, [(module, name)])
    return slots


def head_values(saved: SavedAdapter, site: Site, slots: Mapping[str, Slot]) -> list[Tensor] | None:
    """Return the values of an adapter's classifier; None if the file has none.

    Args:
        saved: The adapter.
        site: The classifier.
        slots: Its tensors, by their names in it.
    """
    keys = head_keys(saved, site)
    if not keys:
        return None

    def value(name: str, slot: Slot) -> Tensor:
        in_file = saved.tensors[keys[name]] if name in keys else None
        with torch.inference_mode(False), torch.no_grad():
            tensor = slot.original.detach() if in_file is None else like(in_file, slot.original).clone()
            return as_value(tensor, slot.original)

    return [value(name, slot) for name, slot in slots.items()]


def head_keys(saved: SavedAdapter, site: Site) -> dict[str, str]:
    """Return the keys that a file has for the tensors of the classifier, by their names in it.

    PEFT and wrappers put something before the classifier's path. The path of another layer may end as this one does
    (`blocks.0.attn.fc` and `fc`); what is before it is longer. If the model is in a wrapper that the file does not
    know, as DataParallel is, its path is the longer one.
    """
    if not saved.config["train_head"]:
        return {}
    names = [*head_slots(site.enter)]
    parts = site.path.split(".")
    for first in range(len(parts)):
        ends = {name: ".".join([*parts[first:], name]) for name in names}
        pairs = ((key, end) for end in ends.values() for key in saved.tensors if f".{key}".endswith(f".{end}"))
        start = min((key.removesuffix(end) for key, end in pairs), key=len, default=None)
        if start is not None:
            return {name: start + end for name, end in ends.items() if start + end in saved.tensors}
    return {}
