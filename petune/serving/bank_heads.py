"""Classifiers of an adapter bank: built for an adapter's classes, filled with its values.

Shapes: B batch, D width of what enters the classifier.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

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


def head_for(site: Site, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Copy a classifier, with as many classes as an adapter's tensors have."""
    head = copy.deepcopy(site.enter)
    for path, module in list(head.named_modules()):
        if not isinstance(module, nn.Linear):
            continue
        saved = find_head_tensor(tensors, site, ".".join(filter(None, (path, "weight"))))
        if saved is None or saved.shape[0] == module.out_features:
            continue
        weight, has_bias = module.weight, module.bias is not None
        resized = nn.Linear(saved.shape[1], saved.shape[0], has_bias, device=weight.device, dtype=weight.dtype)
        if path:
            head.set_submodule(path, resized)
        else:
            head = resized
    return head


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


def head_values(tensors: Mapping[str, Tensor], site: Site, slots: Mapping[str, Slot]) -> list[Tensor] | None:
    """Return the values of an adapter's classifier; None if the file has none.

    Args:
        tensors: By the file's keys.
        site: The classifier.
        slots: Its tensors, by their names in it.
    """
    in_file = {name: find_head_tensor(tensors, site, name) for name in slots}
    if not any(t is not None for t in in_file.values()):
        return None

    def value(name: str, slot: Slot) -> Tensor:
        saved = in_file[name]
        with torch.inference_mode(False), torch.no_grad():
            tensor = slot.original.detach() if saved is None else like(saved, slot.original).clone()
            return as_value(tensor, slot.original)

    return [value(name, slot) for name, slot in slots.items()]


def find_head_tensor(tensors: Mapping[str, Tensor], site: Site, name: str) -> Tensor | None:
    """Return a tensor of the classifier from a file; None if the file does not have it."""
    key = ".".join(filter(None, (site.path, name)))
    return next((tensor for k, tensor in tensors.items() if k == key or k.endswith(f".{key}")), None)
