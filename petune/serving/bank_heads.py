"""Classifiers of an adapter bank: built for an adapter's classes, and moved to where the model is.

Shapes: B batch, D width of what enters the classifier.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import Tensor, nn

from petune.adapters.format import SavedAdapter
from petune.base.errors import BackboneMismatch
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
        key = ".".join(filter(None, (site.path, path, "weight")))
        saved = next((tensor for k, tensor in tensors.items() if k == key or k.endswith(f".{key}")), None)
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


def match_device(head: nn.Module, other: nn.Module) -> nn.Module:
    """Move a classifier to the device and dtype of another; only the one in place moves with the model."""
    own, target = next(head.parameters(), None), next(other.parameters(), None)
    if own is not None and target is not None and (own.device, own.dtype) != (target.device, target.dtype):
        head.to(target.device, target.dtype)
    return head
