"""Run several adapters in one forward, each on its own rows of the batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from petune.base.errors import AttachError
from petune.base.text import plural
from petune.injector.attachment import Attachment
from petune.injector.hooks.base import After, Before, Holder, Parallel
from petune.injector.hooks.prompts import Prompts

Part = tuple[nn.Module, Tensor]
"""An adapter's module, and the rows that it works on, int64."""


class RowAdapters(nn.Module):
    """Apply each adapter to its own rows.

    Attributes:
        parts: The adapters with their rows.
        batch_size: Rows of the batch.
        replaces: True if the output of an adapter replaces its input; otherwise other rows get zeros.
    """

    def __init__(self, parts: list[Part], batch_size: int, *, replaces: bool) -> None:
        super().__init__()
        self.parts = parts
        self.batch_size = batch_size
        self.replaces = replaces

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, ...) to (B, ...).

        Raises:
            AttachError: This site does not have one row per image.
        """
        if len(x) != self.batch_size:
            raise AttachError(
                f"a site has {plural(len(x), 'row')} for {plural(self.batch_size, 'image')}, so its adapters cannot be "
                "mixed in one batch"
            )
        out: Tensor | None = x if self.replaces else None
        for adapter, rows in self.parts:
            y = adapter(x[rows])
            if len(y) == 1:
                y = y.expand(len(rows), *y.shape[1:])
            if out is None:
                out = y.new_zeros(len(x), *y.shape[1:])
            out = out.index_copy(0, rows, y.to(out.dtype))
        assert out is not None
        return out


def sharing_key(attachment: Attachment) -> tuple[Any, ...] | None:
    """Return a key that is equal for adapters that can share a forward; None if the adapter needs its own.

    Prompts change the number of tokens of every row, so all adapters of a forward must have the same prompts.
    """
    log = attachment.edit_log
    prompts = [
        (holder.num_prompts, sites[0].path, sites[-1].exit_path)
        for holder, sites in log.placed
        if isinstance(holder, Prompts)
    ]
    changes_all_rows = (
        log.unfrozen  # the backbone's own values differ
        or not all(type(holder) in {Parallel, Before, After, Prompts} for holder, _ in log.placed)
        or (log.added_parameters and not log.row_toggles)
        or (log.toggles and (prompts or not log.added_parameters))  # attention is adjusted to the prompts
    )
    return None if changes_all_rows else tuple(prompts)


def placement_key(attachment: Attachment) -> frozenset[Any]:
    """Return a key that is equal for adapters of the same kind at the same sites."""
    return frozenset(
        (type(holder), *(id(module) for site in sites for module in site.modules))
        for holder, sites in attachment.edit_log.placed
    )


@contextmanager
def row_wise(adapters: Sequence[tuple[Attachment, list[int]]], batch_size: int) -> Iterator[None]:
    """Enable adapters inside the context, each for its own rows only.

    Args:
        adapters: Attachments, disabled, and the rows of each.
        batch_size: Rows of the batch.
    """
    with ExitStack() as stack:
        prompts: dict[tuple[int, int], tuple[Prompts, list[Part]]] = {}  # by place: the first holder serves all
        for attachment, rows in adapters:
            attachment.enable()
            stack.callback(attachment.disable)
            for toggle in attachment.edit_log.row_toggles:
                toggle(rows, batch_size)
                stack.callback(toggle, None, batch_size)
            index = torch.tensor(rows, device=next(attachment.model.parameters()).device)
            for holder, sites in attachment.edit_log.placed:
                if isinstance(holder, Prompts):
                    place = (id(sites[0].enter), id(sites[-1].exit))
                    prompts.setdefault(place, (holder, []))[1].append((holder.adapter, index))
                    holder.enabled = False  # two attachments must not have prompts at once while this is set up
                else:
                    replaces = isinstance(holder, After | Before)
                    _substitute(stack, holder, RowAdapters([(holder.adapter, index)], batch_size, replaces=replaces))
        for holder, parts in prompts.values():
            holder.enabled = True
            _substitute(stack, holder, RowAdapters(parts, batch_size, replaces=False))
        yield


def _substitute(stack: ExitStack, holder: Holder, module: nn.Module) -> None:
    """Put a module in place of a holder's adapter until the stack closes."""
    stack.callback(setattr, holder, "adapter", holder.adapter)
    holder.adapter = module
