"""Layer-wise decay of the learning rate: lower blocks take smaller steps. The order of the forward decides, not names.

Layer 0 is what runs before the first block, with parameters of the model itself such as a position embedding; layer i
is block i, counted from 1, and what runs between it and the next; the last layer is what runs after the blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn

from petune.base.errors import ConfigError
from petune.sites.recorder import record

if TYPE_CHECKING:
    from petune.injector.attachment import Attachment


def lr_scales(
    attachment: Attachment, params: Mapping[str, nn.Parameter], decay: float | None
) -> dict[str, float] | None:
    """Return the factor of the learning rate of each parameter: decay^(layers above it), by key; None without decay.

    Args:
        attachment: Its sites have the blocks.
        params: Everything that trains, by key.
        decay: Factor from one layer to the one below, as in BEiT (arXiv 2106.08254).

    Raises:
        ConfigError: The model has no blocks, or nothing in them trains.
    """
    if decay is None:
        return None
    layer_of, top = _layers(attachment)
    layers = {key: layer_of.get(id(p), 0) for key, p in params.items()}
    if not any(0 < layer < top for layer in layers.values()):
        raise ConfigError(
            f"layer_decay has no effect: {attachment.name} trains nothing in the blocks of {attachment.sites.model}. "
            "Leave train.layer_decay out, or use a method such as full or partial"
        )
    return {key: decay ** (top - layer) for key, layer in layers.items()}


def _layers(attachment: Attachment) -> tuple[dict[int, int], int]:
    """Return the layer of each parameter by identity, and the number of the last layer."""
    blocks = attachment.sites.all_blocks
    calls = record(attachment.model, attachment.sites.input_spec).calls if blocks else []
    first = {call.module: call for call in sorted(calls, key=lambda call: call.start, reverse=True)}
    starts = sorted(first[block.enter].start for block in blocks)
    end = max((first[block.exit].stop for block in blocks), default=0)
    top = len(blocks) + 1
    layer_of: dict[int, int] = {}
    for module in attachment.model.modules():
        call = first.get(module)
        if call is None:
            continue
        layer = top if call.start > end else sum(start <= call.start for start in starts)
        for parameter in _parameters(module, first):
            layer_of[id(parameter)] = min(layer, layer_of.get(id(parameter), layer))
    for layer, block in enumerate(sorted(blocks, key=lambda block: first[block.enter].start), 1):
        holders = (module for module in block.enter.modules() if hasattr(module, "is_petune_module"))
        for parameter in (p for holder in holders for p in holder.parameters()):  # prompts run before their block
            layer_of[id(parameter)] = max(layer, layer_of.get(id(parameter), layer))
    return layer_of, top


def _parameters(module: nn.Module, called: Mapping[nn.Module, object]) -> list[nn.Parameter]:
    """Return the parameters of a module and of its children that are never called, as an adapter in a hook may be."""
    own = list(module.parameters(recurse=False))
    return own + [p for child in module.children() if child not in called for p in _parameters(child, called)]
