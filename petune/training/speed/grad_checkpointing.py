"""Gradient checkpointing for any model: a block keeps only its input and runs again in the backward pass."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from petune.base.errors import ConfigError
from petune.injector.attachment import Attachment
from petune.injector.hooks.prompts import Prompts


@contextmanager
def checkpoint_blocks(attachment: Attachment) -> Iterator[int]:
    """Run every block that gradients reach again in the backward pass, its hooks included, inside the context.

    Yields:
        The number of blocks.

    Raises:
        ConfigError: The model has no block that can run again.
    """
    blocks = checkpointable(attachment)
    if not blocks:
        raise ConfigError(
            f"grad_checkpointing is not possible: no block of {attachment.sites.model} can run twice with "
            f"{attachment.name}. Use grad_checkpointing=false"
        )
    for block in blocks:
        contexts = functools.partial(_contexts, block)
        run = functools.partial(checkpoint, block._call_impl, use_reentrant=False, context_fn=contexts)
        # nn.Module calls this instead of its own call with all hooks; module.compile() of torch uses it, too
        block._compiled_call_impl = run
    try:
        yield len(blocks)
    finally:
        for block in blocks:
            block._compiled_call_impl = None


def checkpointable(attachment: Attachment) -> list[nn.Module]:
    """Return the blocks that are one module, without those in which an adapter reads for another block.

    Such an adapter would read twice.
    """
    blocks = [block.enter for block in attachment.sites.all_blocks if block.is_module]
    number_of = {id(module): number for number, block in enumerate(blocks) for module in block.modules()}
    excluded: set[int | None] = set()
    for placed in attachment.edit_log.placed:
        if not isinstance(placed.holder, Prompts):
            touched = {number_of.get(id(module)) for site in placed.sites for module in site.modules}
            if len(touched) > 1:
                excluded |= touched
    return [block for number, block in enumerate(blocks) if number not in excluded]


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of the forward and of its repetition."""
    return nullcontext(), _statistics_unchanged(block)


@contextmanager
def _statistics_unchanged(block: nn.Module) -> Iterator[None]:
    """Let the repetition update copies of the running statistics: autograd checks that the originals stay."""
    norms = [m for m in block.modules() if isinstance(m, _BatchNorm) and m.training]
    originals = [dict(norm._buffers) for norm in norms]
    try:
        for norm in norms:
            norm._buffers.update({name: None if b is None else b.clone() for name, b in norm._buffers.items()})
        yield
    finally:
        for norm, buffers in zip(norms, originals, strict=True):
            norm._buffers.update(buffers)
