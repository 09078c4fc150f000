"""Gradient checkpointing for any model: a block keeps its input only, and is computed again in backward."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import nn
from torch.utils.checkpoint import checkpoint

from petune.errors import ConfigError
from petune.hooks import Branch, Gather

if TYPE_CHECKING:
    from petune.attach import Attachment


@contextmanager
def recomputed(attachment: Attachment) -> Iterator[int]:
    """Inside, every block that gradients reach is computed again in backward, its hooks included.

    A block in which an adapter reads for a later block stays as it is: it would read twice.

    Yields:
        How many blocks.

    Raises:
        ConfigError: The model has no block that can be.
    """
    blocks = checkpointable(attachment)
    if not blocks:
        raise ConfigError(
            f"grad_checkpointing needs blocks that can be computed again, but {attachment.sites.model} with "
            f"{attachment.name} has none; leave it off"
        )
    for block in blocks:
        # what nn.Module calls in place of its own call, hooks and all; torch's own module.compile() puts it here too
        again = functools.partial(checkpoint, block._call_impl, use_reentrant=False)
        block._compiled_call_impl = again
    try:
        yield len(blocks)
    finally:
        for block in blocks:
            block._compiled_call_impl = None


def checkpointable(attachment: Attachment) -> list[nn.Module]:
    """Blocks that are one module, and that no adapter reads from for another block."""
    whole = [b.enter for b in attachment.sites.blocks if b.is_module]
    block_of = {id(m): number for number, block in enumerate(whole) for m in block.modules()}
    torn: set[int | None] = set()
    for holder, passed in attachment.edit.holders:
        if isinstance(holder, Branch | Gather):
            ends = {block_of.get(id(m)) for site in passed for m in site.modules}
            torn |= ends if len(ends) > 1 else set()
    return [block for number, block in enumerate(whole) if number not in torn]
