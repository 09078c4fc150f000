"""Run several adapters in one forward, each on its own rows of the batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from petune.base.errors import AttachError
from petune.injector.hooks.base import After, Before, Holder
from petune.injector.hooks.prompts import AttentionPrompts, Prompts
from petune.injector.hooks.reading import Gather, Parallel
from petune.injector.hooks.spanning import Spanning
from petune.injector.hooks.stream import Stream
from petune.serving.bank_kind import AdapterKind, EditedModule
from petune.serving.row_groups import RowAdapters, RowBatch, RowModule, Segment

HOLDERS = {Parallel, Before, After, Stream, Gather, Spanning, Prompts, AttentionPrompts}
"""Holders whose adapter can be exchanged for one that looks at rows."""


def sharing_key(kind: AdapterKind) -> tuple[Any, ...] | None:
    """Return a key that is equal for kinds that may share a forward; None if each adapter needs its own.

    Prompts change the number of tokens of every row, so all adapters of a forward must have the same prompts.
    """
    log = kind.log
    prompts = [
        (holder.num_prompts, type(holder), sites[0].path, sites[-1].exit_path)
        for holder, sites in log.placed
        if isinstance(holder, Prompts)
    ]
    if log.changes_all_rows or not all(type(holder) in HOLDERS for holder, _ in log.placed):
        return None
    if prompts and log.toggles:  # attention is adjusted to the prompts, which another kind may do in another way
        return (*prompts, id(kind))
    return tuple(prompts)


@contextmanager
def row_wise(segments: Sequence[Segment]) -> Iterator[None]:
    """Enable adapters inside the context, each for its own rows only.

    Args:
        segments: All rows of the batch; the adapters are disabled.
    """
    batch = RowBatch(segments)
    kinds = list(dict.fromkeys(s.kind for s in segments if s.kind is not None))
    holders = _adapters_by_holder(kinds)
    with ExitStack() as stack:
        for kind in kinds:
            stack.callback(kind.disable)
            kind.enable(holders)
        for holder, adapters in holders.items():
            replaces = isinstance(holder, After | Before | Stream)
            stack.callback(setattr, holder, "adapter", holder.adapter)
            holder.adapter = RowAdapters(batch, adapters, replaces=replaces)
        replaced = [RowModule(batch, module, edits) for module, edits in _edits_by_module(kinds).items()]
        for row_module in replaced:
            _replace_forward(stack, row_module)
        yield
        if not all(row_module.was_called for row_module in replaced):
            raise AttachError("a module that differs between adapters was not called in a mixed batch")


def _adapters_by_holder(kinds: Sequence[AdapterKind]) -> dict[Holder, dict[AdapterKind, tuple[nn.Module, list[int]]]]:
    """Return the adapters that act in each holder. Of holders of prompts at one place the first one serves all."""
    adapters: dict[Holder, dict[AdapterKind, tuple[nn.Module, list[int]]]] = {}
    prompts: dict[tuple[int, int], Holder] = {}
    for kind in kinds:
        for holder, sites in kind.log.placed:
            acting = holder
            if isinstance(holder, Prompts):
                acting = prompts.setdefault((id(sites[0].enter), id(sites[-1].exit)), holder)
            adapters.setdefault(acting, {})[kind] = (holder.adapter, kind.slots_of_holder[holder])
    return adapters


def _edits_by_module(kinds: Sequence[AdapterKind]) -> dict[nn.Module, dict[AdapterKind, EditedModule]]:
    """Return what the kinds change in modules of the backbone, by module."""
    edits: dict[nn.Module, dict[AdapterKind, EditedModule]] = {}
    for kind in kinds:
        for edit in kind.edited:
            edits.setdefault(edit.module, {})[kind] = edit
    return edits


def _replace_forward(stack: ExitStack, row_module: RowModule) -> None:
    """Let a module compute slices of rows until the stack closes."""
    module = row_module.module
    if "forward" in module.__dict__:
        stack.callback(setattr, module, "forward", module.__dict__["forward"])
    else:
        stack.callback(delattr, module, "forward")
    module.forward = row_module
