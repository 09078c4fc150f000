"""Parameters that a model's author fixed with requires_grad=False, such as sin-cos positions: no method trains them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from petune.adapters.fingerprint import PLAIN
from petune.adapters.format import SavedAdapter
from petune.injector.keys import named_parameters
from petune.sites.site import modules_of
from petune.sites.sites import Sites

FILE_PREFIX = "base_model.model."


@dataclass(frozen=True)
class SavedTraining:
    """The record of an adapter's training, which cannot be seen in the model that it is loaded into.

    Attributes:
        keys: Of the tensors that the file holds, which train.
        left_fixed: Paths of the parameters that the method left as they were.
    """

    keys: frozenset[str] = frozenset()
    left_fixed: frozenset[str] = frozenset()

    @classmethod
    def of(cls, saved: SavedAdapter) -> SavedTraining:
        """Read what an adapter says."""
        return cls.of_config(saved.tensors, saved.config.get("left_fixed"))

    @classmethod
    def of_config(cls, file_keys: Iterable[str], left_fixed: Iterable[str] | None) -> SavedTraining:
        """Return the record for the file's keys of an adapter's tensors, and what its configuration says."""
        return cls(frozenset(key.removeprefix(FILE_PREFIX) for key in file_keys), frozenset(left_fixed or ()))


def fixed_parameters(
    model: nn.Module, sites: Sites, frozen: Sequence[nn.Parameter], saved: SavedTraining
) -> list[nn.Parameter]:
    """Return those of the parameters frozen before anything was attached that stay frozen whatever a method trains.

    If most of the backbone trains, and something in every block, these are all. Else a user has frozen the backbone, or
    some blocks, and what the method names trains; but masks with infinite values never do. The classifier does not
    count. Quantized weights are refused elsewhere.
    """
    in_head = {id(p) for m in sites.head_modules() for p in m.parameters()}
    own = [p for p in frozen if id(p) not in in_head and type(p) in PLAIN and p.is_floating_point()]
    named = named_parameters(model)
    keys = {id(p): key for key, p in named.items()}
    if saved.left_fixed or any(keys.get(id(p)) in saved.keys for p in own):
        others = {id(p) for p in own if keys.get(id(p)) not in saved.keys}
        return [p for key, p in named.items() if id(p) in others or key in saved.left_fixed]
    backbone = [p for p in named.values() if id(p) not in in_head]
    if _is_mostly_trainable(backbone, sites):
        return own
    return [p for p in own if not p.is_meta and not bool(torch.isfinite(p.detach()).all())]


def _is_mostly_trainable(backbone: Sequence[nn.Parameter], sites: Sites) -> bool:
    trainable = sum(p.numel() for p in backbone if p.requires_grad)
    blocks = ([p for m in modules_of([block]) for p in m.parameters()] for block in sites.all_blocks)
    is_frozen = any(block and not any(p.requires_grad for p in block) for block in blocks)
    return not is_frozen and 2 * trainable > sum(p.numel() for p in backbone)
