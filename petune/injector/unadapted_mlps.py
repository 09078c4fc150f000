"""Name the MLPs that get nothing although a method adapts the MLP next to them, which sees other tokens."""

from __future__ import annotations

import warnings

from torch import nn

from petune.base.text import shortened
from petune.injector.attachment import Attachment
from petune.injector.hooks.base import After, Before
from petune.injector.hooks.reading import Gather, Parallel
from petune.injector.hooks.side import Side
from petune.sites.site import Block, modules_in

MAX_SHOWN = 4


def warn_of_unadapted_mlps(attachment: Attachment) -> None:
    """Warn if adapters act at the MLP of a block, and not at its MLPs for other tokens (`Block.split_mlps`)."""
    pairs = [
        (block.mlp if "mlp" in block.parts else block, other)
        for block in attachment.sites.blocks
        if block.split_mlps and _acts_at_mlp(attachment, block)
        for other in block.split_mlps
        if not _acts_in(attachment, modules_in([other]))
    ]
    if not pairs:
        return
    adapted = list(dict.fromkeys(site.where for site, _ in pairs))
    left = list(dict.fromkeys(site.where for _, site in pairs))
    warnings.warn(
        f"blocks of {attachment.sites.model} have several MLPs, each for other tokens. {attachment.name} adapts "
        f"{shortened(adapted, MAX_SHOWN)} and leaves {shortened(left, MAX_SHOWN)} as they are, with the tokens that "
        "go through these. To reach all, use bitfit, partial or full, or lora with PEFT's option target_modules",
        stacklevel=3,
    )


def _acts_at_mlp(attachment: Attachment, block: Block) -> bool:
    """Return whether an adapter acts at a block's MLP, its norm, the stream before it, or at either end of the block.

    At its ends are all its tokens, unless the block has several streams, of which its MLP and an adapter have one.
    """
    placed = attachment.edit_log.placed
    own = [site for site in block.branches if site.role == "mlp"]
    around = {norm.enter for norm in block.norms if norm.role == "norm2"}
    is_a_stream = "mid" in block.parts
    of_streams = [sites for holder, sites in placed if isinstance(holder, After | Before | Gather | Parallel | Side)]
    if is_a_stream and any(site is block for sites in of_streams for site in sites):
        return True
    return _acts_in(attachment, modules_in(own)) or not around.isdisjoint(_ends_of_placed(attachment))


def _acts_in(attachment: Attachment, modules: set[nn.Module]) -> bool:
    """Return whether an adapter reads or acts at some modules, or a matrix trains in them."""
    trained = {id(p) for p in attachment.tuned.values() if p.ndim >= 2}
    return not modules.isdisjoint(_ends_of_placed(attachment)) or any(
        id(p) in trained for m in modules for p in m.parameters()
    )


def _ends_of_placed(attachment: Attachment) -> set[nn.Module]:
    sites = (site for _, passed in attachment.edit_log.placed for site in passed)
    return {end for site in sites for end in (site.enter, site.exit)}
