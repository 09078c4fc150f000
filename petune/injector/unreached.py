"""Name layers that a method trains without effect, and models whose output does not depend on the image."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Set
from typing import Any

import torch
from torch import Tensor, nn

from petune.base.text import shortened
from petune.injector.attachment import Attachment
from petune.sites.forward import forward_of, tensors_in
from petune.sites.hooked import removed_after
from petune.sites.random_numbers import is_large
from petune.sites.returned import tensors_returned
from petune.sites.routed import routed_parameters
from petune.sites.site import is_within
from petune.sites.sites import Sites

MAX_SHOWN = 4


def unreached_layers(attachment: Attachment, leaves: Set[int]) -> list[str]:
    """Return the outermost modules in attentions and MLPs in which a method trains, and no gradient reaches anything.

    Args:
        attachment: The attachment.
        leaves: Identities of the parameters that the output depends on.
    """
    dead = {id(p) for p in attachment.tuned.values() if id(p) not in leaves}
    sublayers = [site for block in attachment.sites.blocks for site in (*block.branches, *block.split_mlps)]
    return outermost_dead(attachment, dead, {path for site in sublayers for path, _ in site.named_modules})


def outermost_dead(attachment: Attachment, dead: Set[int], roots: Set[str]) -> list[str]:
    """Return the outermost modules in some others in which a method trains a matrix, and nothing of it learns.

    Args:
        attachment: The attachment.
        dead: Identities of the parameters that do not learn.
        roots: Paths of the modules to look in.
    """
    if not dead:
        return []
    model, sites = attachment.model, attachment.sites
    alive = {id(p) for p in attachment.tuned.values()} - dead
    alive |= routed_parameters(model, sites.input_spec, sites.block_modules())  # one batch reaches few experts
    found: list[str] = []
    for path, module in model.named_modules():
        is_inside = any(is_within(path, root) for root in roots) and not any(is_within(path, other) for other in found)
        own = [*module.parameters()] if is_inside else []
        if any(id(p) in dead and p.ndim > 1 for p in own) and not any(id(p) in alive for p in own):
            found.append(path)
    return found


def warn_of_unreached(attachment: Attachment, paths: list[str]) -> None:
    """Warn of modules in which what a method trains changes nothing."""
    if paths:
        shown = shortened(paths, MAX_SHOWN)
        warnings.warn(
            f"{attachment.name} also trains {shown} of {attachment.sites.model}, and learns nothing there: the output "
            "does not depend on it. Leave the block out with blocks=…, or let the model use what it computes there",
            stacklevel=5,
        )


def warn_of_ignored_images(model: nn.Module, sites: Sites) -> None:
    """Warn if the head, or without one the output, gets the same for two different images.

    A model so large that a forward takes seconds is not tried.
    """
    has_content = any(spec.dtype is None and not spec.values for spec in sites.input_spec.tensors)
    if not has_content or is_large(model):
        return
    with contextlib.suppress(Exception):  # whatever the model's own code raises on noise
        first, second = (_entering_head(model, sites, seed) for seed in (0, 1))
        if first and len(first) == len(second) and all(map(torch.equal, first, second)):
            receiver = f"its head ({sites.head.where})" if "head" in sites.parts else "its output"
            warnings.warn(
                f"{sites.model} computes the same for two different images: {receiver} does not depend on them, so "
                "nothing that reads the images can learn. Check the model without petune",
                stacklevel=4,
            )


def _entering_head(model: nn.Module, sites: Sites, seed: int) -> list[Tensor]:
    """Return what enters the heads for an image of noise; without a head what the model returns."""
    entered: list[Tensor] = []

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        entered.extend(x.detach().clone() for x in tensors_in((args, kwargs)))

    heads = dict.fromkeys(sites.head.modules) if "head" in sites.parts else {}
    handles = [head.register_forward_pre_hook(enter, with_kwargs=True) for head in heads]
    with removed_after(handles):
        returned = forward_of(model, sites.input_spec.noise(1, seed))
    return entered if heads else list(tensors_returned(returned))
