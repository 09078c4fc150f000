"""Compute the rows of one batch with several adapters: each module that differs is called on slices of the rows.

Rows of one adapter are neighbors. A module that is called for some of the rows only, inside another one that is called
for slices, knows which ones these are: the batch keeps the rows of the moment.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from petune.base.errors import AttachError
from petune.base.text import plural
from petune.injector.hooks.base import Args, Kwargs, first_tensor, is_tuple, with_first_tensor
from petune.serving.bank_kind import AdapterKind, AdapterValues, EditedModule, Owner
from petune.serving.row_values import affine_names, along, per_entry, stacked_output


@dataclass(frozen=True)
class Segment:
    """Neighboring rows of one adapter."""

    start: int
    stop: int
    owner: Owner

    @property
    def kind(self) -> AdapterKind | None:
        """The adapter's kind; None for the backbone alone."""
        return self.owner.kind

    @property
    def values(self) -> AdapterValues | None:
        """The adapter's values; None for the backbone alone."""
        return self.owner.values


class RowBatch:
    """The rows of a batch, by adapter.

    Attributes:
        segments: All rows, from the first to the last.
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = segments
        self._rows = (0, segments[-1].stop)

    @contextmanager
    def within(self, start: int, stop: int) -> Iterator[None]:
        """Let modules be called for these rows only, inside the context."""
        before, self._rows = self._rows, (start, stop)
        try:
            yield
        finally:
            self._rows = before

    def slices(self, length: int, kinds: Sequence[AdapterKind] | dict[AdapterKind, Any]) -> list[tuple[Segment, slice]]:
        """Return the segments among the rows of the moment, and where they are in a tensor of this length.

        Args:
            length: Of a tensor's first dimension: one entry per row, or as many for each, such as windows.
            kinds: Neighboring segments of other kinds than these are joined, as rows of the backbone alone.

        Raises:
            AttachError: The tensor has no entries per row.
        """
        first, last = self._rows
        each, rest = divmod(length, last - first)
        if rest or not each:
            raise AttachError(
                f"a site has {plural(length, 'row')} for {plural(last - first, 'image')}, so its adapters cannot be "
                "mixed in one batch"
            )
        found: list[Segment] = []
        for segment in self.segments:
            start, stop = max(segment.start, first), min(segment.stop, last)
            if start >= stop:
                continue
            if segment.kind in kinds:
                found.append(Segment(start, stop, segment.owner))
            elif found and found[-1].kind is None:
                found[-1] = Segment(found[-1].start, stop, Owner())
            else:
                found.append(Segment(start, stop, Owner()))
        return [(s, slice((s.start - first) * each, (s.stop - first) * each)) for s in found]


class RowAdapters(nn.Module):
    """Replaces the adapter of a holder, and applies each adapter to its own rows.

    Attributes:
        batch: The rows.
        adapters: The module and its slots for each kind that acts at this site.
        replaces: True if the output of an adapter replaces its input; otherwise other rows get zeros.
    """

    def __init__(
        self, batch: RowBatch, adapters: dict[AdapterKind, tuple[nn.Module, list[int]]], *, replaces: bool
    ) -> None:
        super().__init__()
        self.batch = batch
        self.adapters = adapters
        self.replaces = replaces

    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        """Map (B, ...) to (B, ...), or a list of such tensors.

        Raises:
            AttachError: This site does not have as many rows for each image.
        """
        lengths = {len(t) for t in x} if isinstance(x, list) else {len(x)}
        if len(lengths) > 1:
            raise AttachError("an adapter reads sites with different numbers of rows, and cannot be mixed in one batch")
        slices = self.batch.slices(lengths.pop(), self.adapters)
        if not self.replaces and all(segment.kind is None for segment, _ in slices):
            module, _ = next(iter(self.adapters.values()))
            return torch.zeros_like(module(x))  # none of the adapters acts on these rows
        return join(self._parts(x, slices), slices[-1][1].stop)

    def _parts(self, x: Tensor | list[Tensor], slices: list[tuple[Segment, slice]]) -> Iterator[Part]:
        """Yield outputs with their rows, in the order of the rows."""
        for kind, group in itertools.groupby(slices, lambda pair: pair[0].kind):
            own = [*group]
            if kind is not None and kind.is_elementwise and isinstance(x, Tensor) and self._has_vectors(kind):
                rows = slice(own[0][1].start, own[-1][1].stop)
                yield self._stacked(x[rows], kind, own), rows
            else:
                yield from ((self._part(segment, x, rows), rows) for segment, rows in own)

    def _has_vectors(self, kind: AdapterKind) -> bool:
        _, slots = self.adapters[kind]
        return bool(slots) and all(kind.slots.slots[index].original.ndim == 1 for index in slots)

    def _stacked(self, x: Tensor, kind: AdapterKind, slices: list[tuple[Segment, slice]]) -> Tensor:
        """Call the adapters of a kind once for all of their rows, with vectors that have a row for each of them."""
        module, slots = self.adapters[kind]
        for index in slots:
            vectors: list[Tensor] = []
            for segment, _ in slices:
                assert segment.values is not None
                vectors += [kind.slots.value(segment.values.tensors, index)] * (segment.stop - segment.start)
            kind.slots.slots[index].put(along(per_entry(torch.stack(vectors), len(x)), x, -1))
        y: Tensor = module(x)
        return y

    def _part(self, segment: Segment, x: Tensor | list[Tensor], rows: slice) -> Tensor | None:
        """Return the output for one segment; None for zeros."""
        part: Any = [t[rows] for t in x] if isinstance(x, list) else x[rows]
        if segment.kind is None or segment.values is None:
            return part if self.replaces else None
        module, slots = self.adapters[segment.kind]
        segment.kind.slots.put(segment.values.tensors, slots)
        with self.batch.within(segment.start, segment.stop):
            y: Tensor = module(part)
        return y


class RowModule:
    """Replaces the forward of a module, and computes something else for each adapter.

    Args:
        batch: The rows.
        module: The module.
        edits: How each kind changes it.
    """

    def __init__(self, batch: RowBatch, module: nn.Module, edits: dict[AdapterKind, EditedModule]) -> None:
        self.batch = batch
        self.module = module
        self.edits = edits
        own: Callable[..., Any] | None = module.__dict__.get("forward")
        self.forward = own or functools.partial(type(module).forward, module)
        self.was_called = False
        self.can_stack = own is None and all(edit.can_stack for edit in edits.values())
        self.is_watched = any(m._forward_hooks for m in module.modules())  # someone may have kept what layers return
        self.only_adds = all(edit.layer is not None and edit.layer.addition is not None for edit in edits.values())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute what the module does, slice by slice.

        Raises:
            AttachError: It takes several tensors, or returns something that cannot be joined.
        """
        self.was_called = True
        x = first_tensor(args, kwargs)
        if any(isinstance(v, Tensor) and v is not x for v in (*args, *kwargs.values())):
            raise AttachError("a module takes several tensors, so its rows cannot be computed one by one")
        slices = self.batch.slices(len(x), self.edits)
        if self.can_stack and len(args) + len(kwargs) == 1:
            return stacked_output(self.module, self.forward, x, self._values_of_rows(slices))
        self._switch(None)
        if self.only_adds:
            return self._added(x, self.forward(*args, **kwargs), slices)
        return join_outputs(((self._part(s, x[rows], args, kwargs), rows) for s, rows in slices), len(x))

    def _part(self, segment: Segment, x: Tensor, args: Args, kwargs: Kwargs) -> Any:
        args, kwargs = with_first_tensor(args, kwargs, x)
        self._switch(segment.kind)
        self._put(segment)
        try:
            with self.batch.within(segment.start, segment.stop):
                return self.forward(*args, **kwargs)
        finally:
            self._switch(None)

    def _values_of_rows(self, slices: list[tuple[Segment, slice]]) -> dict[str, list[Tensor]]:
        """Return the tensors that scale and shift the output, for each row."""
        values: dict[str, list[Tensor]] = {name: [] for name in affine_names(self.module)}
        for segment, _ in slices:
            changed = {}
            if segment.kind is not None and segment.values is not None:
                edit, slots = self.edits[segment.kind], segment.kind.slots
                pairs = zip(edit.names, edit.slots, strict=True)
                changed = {name: slots.value(segment.values.tensors, index) for name, index in pairs}
            for name, tensors in values.items():
                value = changed.get(name, getattr(self.module, name))
                tensors += [value] * (segment.stop - segment.start)
        return values

    def _added(self, x: Tensor, output: Any, slices: list[tuple[Segment, slice]]) -> Tensor:
        if not isinstance(output, Tensor) or len(output) != len(x):
            raise AttachError("a layer returned something else than a tensor with as many rows as it was given")
        own = output.untyped_storage().data_ptr() != x.untyped_storage().data_ptr() and not self.is_watched
        parts = []
        for segment, rows in slices:
            part = output[rows]
            if segment.kind is not None:
                self._put(segment)
                layer = self.edits[segment.kind].layer
                assert layer is not None
                assert layer.addition is not None
                with self.batch.within(segment.start, segment.stop):
                    change = layer.addition(x[rows])
                if own and not torch.is_grad_enabled():
                    part.add_(change) if change.dtype == part.dtype else part.copy_(part + change)
                else:
                    part = (part + change).to(part.dtype)
            parts.append((part, rows))
        return output if own and not torch.is_grad_enabled() else join(parts, len(output))

    def _put(self, segment: Segment) -> None:
        for kind, edit in self.edits.items():
            if edit.layer is None:  # another kind may have other values for the same tensors
                for index in edit.slots:
                    kind.slots.slots[index].restore()
        if segment.kind is not None and segment.values is not None:
            segment.kind.slots.put(segment.values.tensors, self.edits[segment.kind].slots)

    def _switch(self, kind: AdapterKind | None) -> None:
        """Let the changes of one kind take effect in this module, and no others."""
        for other, edit in self.edits.items():
            if edit.layer is not None:
                edit.layer.switch(other is kind)


Part = tuple[Tensor | None, slice]
"""The output for neighboring rows, and where they are; None is zeros."""


def join(parts: Iterable[Part], length: int) -> Tensor:
    """Return outputs for neighboring rows as one tensor.

    Without gradients each part is copied as soon as it is computed, while it is in the processor's cache.

    Args:
        parts: Outputs with their rows, from the first to the last. None is zeros, a single row is repeated over its
            slice; one at least is a tensor.
        length: Number of all rows.
    """
    in_place = not torch.is_grad_enabled()
    result: Tensor | None = None
    waiting: list[tuple[Tensor | None, slice]] = []
    for part, rows in parts:
        if part is not None and len(part) == length:
            return part
        if part is None or not in_place:
            waiting.append((part, rows))
            continue
        if result is None:
            result = part.new_empty(length, *part.shape[1:])
        result[rows] = part
    if result is not None:
        for _, rows in waiting:
            result[rows] = 0
        return result
    sample = next(part for part, _ in waiting if part is not None)
    zero = sample.new_zeros(1, *sample.shape[1:])
    full = [(zero if part is None else part, rows.stop - rows.start) for part, rows in waiting]
    return torch.cat([part.to(sample.dtype).expand(count, *sample.shape[1:]) for part, count in full])


def join_outputs(parts: Iterable[tuple[Any, slice]], length: int) -> Any:
    """Return what a module returned for neighboring rows as if it had been called once.

    Raises:
        AttachError: It returned something else than tensors.
    """
    iterator = iter(parts)
    first, rows = next(iterator)
    if isinstance(first, Tensor):
        return join(itertools.chain([(first, rows)], iterator), length)
    outputs = [(first, rows), *iterator]
    if is_tuple(first) and all(item is None or isinstance(item, Tensor) for item in first):
        columns = zip(*(output for output, _ in outputs), strict=True)
        slices = [rows for _, rows in outputs]
        joined = (None if items[0] is None else join(zip(items, slices, strict=True), length) for items in columns)
        return tuple(joined) if type(first) is tuple else type(first)._make(joined)
    raise AttachError(f"a module returned a {type(first).__name__}, so its rows cannot be computed one by one")
