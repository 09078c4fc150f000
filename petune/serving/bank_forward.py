"""Forwards of a model with the adapters of a bank: one adapter for all rows, or several in one batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from petune.base.errors import AttachError
from petune.serving.bank_heads import CaptureInput, head_slots
from petune.serving.bank_kind import AdapterKind, Owner, ValueSlots
from petune.serving.mixed_batch import row_wise
from petune.serving.row_groups import Segment
from petune.sites.forward import device_of, dtype_of
from petune.sites.hooked import removed_after
from petune.sites.input_spec import Inputs
from petune.sites.logits import logits_of, synthetic_logits
from petune.sites.sites import Sites
from petune.sites.undisturbed import undisturbed


class BankForward:
    """Computes batches. No adapter of the bank is active before and after.

    Attributes:
        head: The model's classifier.
        head_slots: Its tensors, by their names in it.
        head_is_last: True if the model returns exactly what its classifier returns.
        active: The adapter that the model computes with.
    """

    def __init__(self, model: nn.Module, sites: Sites) -> None:
        self.model = model
        self.sites = sites
        self.active = Owner()
        self.head = sites.head
        self.head_slots = head_slots(self.head.enter)
        self._head_values = ValueSlots(list(self.head_slots.values()))
        self.head_is_last = self._returns_head_output()

    def set_head(self, head: nn.Module) -> None:
        """Let the model have this classifier."""
        self.model.set_submodule(self.head.path, head)

    def check_head(self) -> None:
        """Check that the model has the classifier that it had when the bank was made.

        Raises:
            AttachError: It has another one.
        """
        kind = self.active.kind
        expected = kind.head if kind is not None and kind.acts_at_head else self.head.enter
        if self.model.get_submodule(self.head.path) is not expected:
            raise AttachError(
                f"the classifier {self.head.path} was replaced while an AdapterBank holds this model. Put it back, or "
                "call bank.close() and make another AdapterBank"
            )

    def activate(self, owner: Owner) -> None:
        """Let the model compute with an adapter, until `deactivate`."""
        self.active = owner
        kind, values = owner
        if kind is None or values is None:
            return
        if kind.acts_at_head:
            kind.head.to(device_of(self.head.enter), dtype_of(self.head.enter))
            self.set_head(kind.head)
            own = [slot.current for slot in self._head_values.slots]
            kind.head_slots.put(own if values.head is None else values.head)
        elif values.head is not None:
            self._head_values.put(values.head)
        kind.slots.put(values.tensors)
        kind.enable()

    def deactivate(self, owner: Owner) -> None:
        """Let the model compute without the adapter again."""
        self.active = Owner()
        if owner.kind is not None:
            self._head_values.restore()
            owner.kind.disable()
            if owner.kind.acts_at_head:
                owner.kind.head_slots.restore()
                self.set_head(self.head.enter)

    @contextmanager
    def head_of(self, kind: AdapterKind) -> Iterator[None]:
        """Let the model have the classifier of a kind inside the context, if the kind put something there."""
        if not kind.acts_at_head:
            yield
            return
        try:
            self.set_head(kind.head)
            yield
        finally:
            self.set_head(self.head.enter)

    @contextmanager
    def activated(self, owner: Owner) -> Iterator[None]:
        """Let the model compute with an adapter inside the context."""
        try:
            self.activate(owner)
            yield
        finally:
            self.deactivate(owner)

    def logits(self, x: Inputs, owners: Sequence[Owner]) -> list[Tensor]:
        """Return the logits of each row with its own adapter, in as few forwards as possible."""
        groups: dict[Any, list[int]] = {}
        for row, owner in enumerate(owners):
            groups.setdefault(_group(owner), []).append(row)
        found: dict[int, Tensor] = {}
        for group in (part for rows in groups.values() for part in _without_conflicts(rows, owners)):
            rows = _sorted_by_owner(group, owners)
            inputs = x if rows == list(range(len(owners))) else self.sites.input_spec.select(x, rows)
            found |= zip(rows, self._logits_of_group(inputs, [owners[row] for row in rows]), strict=True)
        return [found[row] for row in range(len(owners))]

    def trial_logits(self) -> Tensor:
        """Return the logits of two synthetic images, of the model as it is now."""
        x = self.sites.input_spec.noise(2).to(device_of(self.model), dtype_of(self.model))
        with undisturbed(self.model), torch.no_grad():
            return logits_of(x.call(self.model)).clone()

    def features(self, owners: Sequence[Owner]) -> Tensor:
        """Return what enters the classifier for the first synthetic images, one for each owner.

        This is the forward of `logits`, without hooks that would keep torch from its fused kernels.
        """
        inputs = self.sites.input_spec.noise(3).to(device_of(self.model), dtype_of(self.model))
        x = self.sites.input_spec.select(inputs, list(range(len(owners))))
        rows = _sorted_by_owner(list(range(len(owners))), owners)
        back = sorted(range(len(rows)), key=rows.__getitem__)
        with undisturbed(self.model), torch.no_grad():
            if len({*owners}) == 1:
                with self.activated(owners[0]), self._captured_head() as capture:
                    x.call(self.model)
                    return capture.captured
            with self._captured_head() as capture, row_wise(_segments([owners[row] for row in rows])):
                self.sites.input_spec.select(x, rows).call(self.model)
            return capture.captured[back]

    def _logits_of_group(self, x: Inputs, owners: Sequence[Owner]) -> list[Tensor]:
        """Run one forward. If a site has no row per image, run one for each adapter, now and in later calls."""
        if len({*owners}) == 1:
            with self.activated(owners[0]):
                return list(logits_of(x.call(self.model)))
        try:
            return self._mixed_logits(x, _segments(owners))
        except AttachError:
            for owner in owners:
                if owner.kind is not None:
                    owner.kind.sharing = None
        return self.logits(x, owners)

    def _mixed_logits(self, x: Inputs, segments: Sequence[Segment]) -> list[Tensor]:
        """Run the body of the model once, then each classifier on the rows of its adapter."""
        with self._captured_head() as capture, row_wise(segments):
            x.call(self.model)
        logits: list[Tensor] = []
        try:
            for segment in segments:
                if segment.values is not None and segment.values.head is not None:
                    self._head_values.put(segment.values.head)
                else:
                    self._head_values.restore()
                logits += self.head.enter(capture.captured[segment.start : segment.stop])
        finally:
            self._head_values.restore()
        return logits

    @contextmanager
    def _captured_head(self) -> Iterator[CaptureInput]:
        capture = CaptureInput()
        try:
            self.set_head(capture)
            yield capture
        finally:
            self.set_head(self.head.enter)

    def _returns_head_output(self) -> bool:
        """See `head_is_last`."""
        outputs: list[tuple[Any, Any]] = []

        def record(module: nn.Module, args: Any, output: Any) -> None:
            outputs.append((output, output.clone() if isinstance(output, Tensor) else output))

        handle = self.head.enter.register_forward_hook(record)
        with removed_after([handle]):
            logits = synthetic_logits(self.model, self.sites)
        if len(outputs) != 1 or not isinstance(outputs[0][0], Tensor):
            return False
        output, copy = outputs[0]
        return output.data_ptr() == logits.data_ptr() and torch.equal(copy, logits)


def _group(owner: Owner) -> Any:
    """Return what is equal for owners that can share a forward."""
    if owner.kind is None:
        return ()  # as for adapters without prompts
    return owner.kind.sharing if owner.kind.sharing is not None else ("alone", id(owner.values))


def _without_conflicts(rows: list[int], owners: Sequence[Owner]) -> list[list[int]]:
    """Return the rows in groups whose kinds of adapters do not exchange tensors that the others' layers use."""
    kinds: dict[AdapterKind | None, list[int]] = {}
    for row in rows:
        kinds.setdefault(owners[row].kind, []).append(row)
    parts: list[list[AdapterKind | None]] = []
    for kind in kinds:
        free = (p for p in parts if not any(kind and other and kind.conflicts_with(other) for other in p))
        part = next(free, None)
        if part is None:
            parts.append([kind])
        else:
            part.append(kind)
    return [[row for kind in part for row in kinds[kind]] for part in parts]


def _sorted_by_owner(rows: list[int], owners: Sequence[Owner]) -> list[int]:
    """Return the rows in an order in which those of one adapter, and adapters of one kind, are neighbors."""
    kinds = {kind: n for n, kind in enumerate(dict.fromkeys(owners[row].kind for row in rows))}
    values = {owner: n for n, owner in enumerate(dict.fromkeys(owners[row] for row in rows))}
    return sorted(rows, key=lambda row: (kinds[owners[row].kind], values[owners[row]]))


def _segments(owners: Sequence[Owner]) -> list[Segment]:
    """Return neighboring rows with the same adapter."""
    segments: list[Segment] = []
    for row, owner in enumerate(owners):
        if segments and segments[-1].owner == owner:
            segments[-1] = Segment(segments[-1].start, row + 1, owner)
        else:
            segments.append(Segment(row, row + 1, owner))
    return segments
