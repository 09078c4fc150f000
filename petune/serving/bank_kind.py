"""Adapters of one kind: the same method, options and shapes on the same backbone, of which only the values differ.

One of them is attached to the model. The values of another one are put in the places of its tensors, without a copy.
"""

from __future__ import annotations

import json
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from petune.adapters.format import SavedAdapter
from petune.injector.attachment import Attachment
from petune.injector.edit_log import ChangedLayer
from petune.injector.hooks.base import Holder
from petune.sites.forward import forget_caches

SAME_IN_A_KIND = (
    "tuner", "distribution", "version", "config", "train_head", "geometry", "chosen_sites", "wrapper",
    "fingerprint", "named_fingerprint", "head_fingerprint", "named_head_fingerprint",
)  # fmt: skip
"""What two configurations have in common if one proves for the other that the backbone is the right one."""


@dataclass(eq=False)
class Slot:
    """A tensor of the model whose value differs from adapter to adapter.

    Attributes:
        original: The model's own tensor.
        owners: The modules that hold it, with its name in each.
    """

    original: Tensor
    owners: list[tuple[nn.Module, str]]

    def __post_init__(self) -> None:
        is_parameter = isinstance(self.original, nn.Parameter)
        self._places = [(m._parameters if is_parameter else m._buffers, name) for m, name in self.owners]

    @property
    def current(self) -> Tensor:
        """The tensor that the model uses now."""
        tensors, name = self._places[0]
        return cast(Tensor, tensors[name])

    def put(self, tensor: Tensor) -> None:
        """Let the model use this tensor."""
        for tensors, name in self._places:
            tensors[name] = tensor  # type: ignore[assignment]

    def restore(self) -> None:
        """Let the model use its own tensor, where and in which format the model is now."""
        tensors, name = self._places[0]
        current = tensors[name]
        if current is None or current is self.original:
            return
        if (current.device, current.dtype) != (self.original.device, self.original.dtype):
            self.original.data = like(self.original.data, current)
        self.put(self.original)


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """Return a tensor on the device and, for floating-point numbers, in the dtype of another."""
    with torch.inference_mode(False):  # a tensor that is made in inference mode never trains
        return tensor.to(other.device, other.dtype if tensor.is_floating_point() else None)


@dataclass(eq=False)
class AdapterValues:
    """The values of one adapter.

    Attributes:
        tensors: For the slots of its kind.
        head: For the slots of the classifier; None if it has no classifier of its own.
    """

    tensors: list[Tensor]
    head: list[Tensor] | None

    @property
    def num_bytes(self) -> int:
        """Memory of all tensors."""
        return sum(t.nbytes for t in (*self.tensors, *(self.head or ())))

    def versions(self) -> list[int]:
        """Return what changes when something is written to the tensors."""
        return [t._version for t in (*self.tensors, *(self.head or ()))]


class Owner(NamedTuple):
    """The adapter of a row; without kind and values the backbone alone."""

    kind: AdapterKind | None = None
    values: AdapterValues | None = None


class ValueSlots:
    """Slots that are filled together."""

    def __init__(self, slots: list[Slot]) -> None:
        self.slots = slots

    def value(self, values: list[Tensor], index: int) -> Tensor:
        """Return the value for a slot; it follows the model to its device and dtype."""
        value, slot = values[index], self.slots[index]
        current = slot.current  # a conversion of the model makes new buffers, and leaves the slot's own as it was
        if (value.is_floating_point() and value.dtype != current.dtype) or value.device != current.device:
            values[index] = value = as_value(like(value.detach(), current), slot.original)
        return value

    def put(self, values: list[Tensor], only: list[int] | None = None) -> None:
        """Let the model use these values, or `only` those of some slots."""
        for index in range(len(self.slots)) if only is None else only:
            self.slots[index].put(self.value(values, index))

    def restore(self) -> None:
        """Let the model use its own tensors."""
        for slot in self.slots:
            slot.restore()


@dataclass(frozen=True, eq=False)
class EditedModule:
    """A module that computes something else for each adapter.

    Attributes:
        module: The module.
        slots: Indices of the slots that it uses.
        layer: How it was changed by hand; None for a module of the backbone whose own values differ.
        names: Of the tensors in the module itself, if all slots are there.
        can_stack: True if these tensors only scale and shift the module's output.
    """

    module: nn.Module
    slots: list[int]
    layer: ChangedLayer | None
    names: Sequence[str] = ()
    can_stack: bool = False


class AdapterKind:
    """Adapters of which only the values differ.

    Attributes:
        attachment: The one that is attached, disabled. Its own values are overwritten with those of others.
        head: The classifier that was in the model when it was attached.
        acts_at_head: True if it put something at this classifier, which is in the model while the adapter is used.
        head_slots: The tensors of this classifier.
        exchanged: Ids of those that are saved with each adapter, apart from the slots.
        slots: The tensors whose values differ.
        names: The loaded adapters of this kind.
        edited: By-hand changes and unfrozen modules, if rows of several adapters can share a forward.
        bypassed: Modules whose tensors a changed layer reads or replaces without calling them as they are.
        features: What the first adapter's file says about the backbone's output.
        config: Configuration of the first adapter.
        tensor_keys: Keys of the tensors in the file of each adapter, those of the classifier among them.
        file_keys: For each slot the key that its value has in a file; None while that is not known.
        is_elementwise: True if adapters that are vectors can be called once for rows with vectors of their own.
        sharing: Equal for kinds that can share a forward; None if each adapter needs its own.
    """

    def __init__(self, attachment: Attachment, head: nn.Module, head_slots: list[Slot]) -> None:
        self.attachment = attachment
        self.head = head
        self.acts_at_head = False
        self.head_slots = ValueSlots(head_slots)
        self.log = attachment.edit_log
        self.names: set[str] = set()
        self.edited: list[EditedModule] = []
        self.bypassed: set[nn.Module] = set()
        self.features: Any = None
        self.config: dict[str, Any] = {}
        self.tensor_keys: set[str] = set()
        self.is_elementwise = False
        self.file_keys: list[str] | None = None
        self.sharing: tuple[Any, ...] | None = None
        self.exchanged = {id(slot.original) for slot in head_slots} if attachment.head else set()
        self.keys, slots = _slots_of(attachment, self.exchanged)
        self.slots = ValueSlots(slots)
        self.slots_of_holder = self._slots_by_holder()

    def learn_file_keys(self, saved: SavedAdapter) -> None:
        """Note where the file of an adapter has the value of each slot: as it is, and under the same key as here."""
        own = {(t.data_ptr(), t.dtype, t.shape): key for key, t in self.attachment.file_state().items() if t.numel()}
        keys = [own.get((s.original.data_ptr(), s.original.dtype, s.original.shape), "") for s in self.slots.slots]
        shapes = [saved.tensors[key].shape if key in saved.tensors else None for key in keys]
        if shapes == [slot.original.shape for slot in self.slots.slots]:
            self.file_keys = keys

    def values_from(self, saved: SavedAdapter, head: list[Tensor] | None) -> AdapterValues:
        """Return the values of a saved adapter of this kind, which has the keys of the model at hand."""
        with torch.inference_mode(False), torch.no_grad():
            if self.file_keys is not None:
                pairs = zip(self.file_keys, self.slots.slots, strict=True)
                values = [(like(saved.tensors[key], slot.original).clone(), slot.original) for key, slot in pairs]
                return AdapterValues([as_value(value, original) for value, original in values], head)
            for key, target in self.attachment.file_state().items():
                if key in saved.tensors and saved.tensors[key].shape == target.shape:  # another number of classes
                    target.copy_(saved.tensors[key])
            return self.current_values(head)

    def current_values(self, head: list[Tensor] | None) -> AdapterValues:
        """Return a copy of the values that the attachment has."""
        state = self.attachment.state()
        pairs = zip(self.keys, self.slots.slots, strict=True)
        return AdapterValues([as_value(state[key].detach().clone(), slot.original) for key, slot in pairs], head)

    def has_vectors(self, holder: nn.Module) -> bool:
        """Return True if all values of an adapter are vectors."""
        slots = [self.slots.slots[index] for index in self.slots_of_holder[holder]]
        return bool(slots) and all(slot.original.ndim == 1 for slot in slots)

    def conflicts_with(self, other: AdapterKind) -> bool:
        """Return True if one exchanges tensors that changed layers of the other use: they cannot share a forward."""
        pairs = ((self, other), (other, self))
        return any(edit.layer is None and edit.module in b.bypassed for a, b in pairs for edit in a.edited)

    def enable(self, holders: Container[Holder] | None = None) -> None:
        """Let the adapters of this kind take effect, with the values that are in the slots.

        Args:
            holders: Enable these holders of adapters alone; None enables all.
        """
        for holder, _ in self.log.placed:
            holder.clear()
            holder.enabled = holders is None or holder in holders
        for toggle in self.log.toggles:
            toggle(True)
        self.forget_caches()

    def disable(self) -> None:
        """Let the model compute what it does without them, with its own values."""
        self.log.set_enabled(False)
        self.slots.restore()
        self.forget_caches()

    def forget_caches(self) -> None:
        """Drop what modules of the backbone have computed from their values."""
        if self.log.unfrozen:
            forget_caches(self.attachment.model)

    def trains_inside(self, head: nn.Module) -> bool:
        """Return True if the method trains tensors of a classifier, or entries of them, that the bank does not."""
        own = {id(p) for p in head.parameters()}
        unfrozen = {id(p) for p in self.log.unfrozen} - self.exchanged
        entries = {id(p) for trained in self.log.sparse for p in trained.targets}
        return not own.isdisjoint(unfrozen | entries)

    def indices_in(self, module: nn.Module) -> list[int]:
        """Return the slots with an owner inside a module."""
        inside = set(module.modules())
        return [i for i, slot in enumerate(self.slots.slots) if any(m in inside for m, _ in slot.owners)]

    def _slots_by_holder(self) -> dict[nn.Module, list[int]]:
        """Return the slots that each adapter uses: its own, and those that are in no adapter."""
        own = {holder: self.indices_in(holder) for holder, _ in self.log.placed}
        known = {index for indices in own.values() for index in indices}
        changed = {index for layer in self.log.changed_layers for index in self.indices_in(layer)}
        unfrozen = {id(p) for p in self.log.unfrozen}
        loose = [
            index
            for index, slot in enumerate(self.slots.slots)
            if index not in known | changed and id(slot.original) not in unfrozen
        ]
        return {holder: sorted({*indices, *loose}) for holder, indices in own.items()}


def kind_key(saved: SavedAdapter, head_keys: Container[str]) -> str:
    """Return a text that is equal for adapters of one kind; their classifiers may have other numbers of classes.

    Args:
        saved: An adapter.
        head_keys: The file's keys of its classifier.
    """
    shapes = {key: [str(t.dtype), *_shape_in_kind(t, key in head_keys)] for key, t in saved.tensors.items()}
    config = {name: saved.config.get(name) for name in SAME_IN_A_KIND}
    return json.dumps([config, shapes], sort_keys=True, default=str)


def _shape_in_kind(tensor: Tensor, is_in_head: bool) -> list[int | None]:
    return [None, *tensor.shape[1:]] if is_in_head and tensor.ndim else list(tensor.shape)


def _slots_of(attachment: Attachment, in_head: Container[int]) -> tuple[list[str], list[Slot]]:
    """Return the tensors that the attachment saves, but those of the classifier, with their state_dict keys."""
    live = {key: t for key, t in attachment.tensors.live().items() if id(t) not in in_head}
    owners: dict[int, list[tuple[nn.Module, str]]] = {id(t): [] for t in live.values()}
    for module in attachment.model.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if id(tensor) in owners:
                owners[id(tensor)].append((module, name))
    return list(live), [Slot(t, owners[id(t)]) for t in live.values()]


def as_value(tensor: Tensor, original: Tensor) -> Tensor:
    return nn.Parameter(tensor, requires_grad=False) if isinstance(original, nn.Parameter) else tensor
