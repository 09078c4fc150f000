"""Gradient checkpointing for any model: a block keeps its input only, and is computed again in backward."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from petune.base.errors import ConfigError
from petune.injector.hooks.base import Gather, Parallel

if TYPE_CHECKING:
    from petune.injector.attachment import Attachment


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
        twice = functools.partial(_contexts, block)
        again = functools.partial(checkpoint, block._call_impl, use_reentrant=False, context_fn=twice)
        block._compiled_call_impl = again
    try:
        yield len(blocks)
    finally:
        for block in blocks:
            block._compiled_call_impl = None


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Of the forward, and of its repetition."""
    return nullcontext(), _statistics_kept(block)


@contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """Running statistics are those of one forward: the repetition moves copies; autograd watches the originals."""
    norms = [m for m in block.modules() if isinstance(m, _BatchNorm) and m.training]
    kept = [dict(norm._buffers) for norm in norms]
    try:
        for norm in norms:
            norm._buffers.update({name: None if b is None else b.clone() for name, b in norm._buffers.items()})
        yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            norm._buffers.update(buffers)


def checkpointable(attachment: Attachment) -> list[nn.Module]:
    """Blocks that are one module, and that no adapter reads from for another block."""
    whole = [b.enter for b in attachment.sites.blocks if b.is_module]
    block_of = {id(m): number for number, block in enumerate(whole) for m in block.modules()}
    torn: set[int | None] = set()
    for holder, passed in attachment.edit_log.placed:
        if isinstance(holder, Parallel | Gather):
            ends = {block_of.get(id(m)) for site in passed for m in site.modules}
            torn |= ends if len(ends) > 1 else set()
    return [block for number, block in enumerate(whole) if number not in torn]
