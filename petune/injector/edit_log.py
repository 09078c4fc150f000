"""`EditLog`: what one tuner has changed on a model, so that it can be disabled, merged, saved and undone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

from petune.base.errors import AttachError
from petune.injector.calibration import CalibrationState
from petune.injector.hooks.base import Holder
from petune.injector.keys import TensorOwner
from petune.injector.sparse import SparseParameters, full_gradients
from petune.injector.zero_entries import ZeroEntries
from petune.sites.site import Site

Toggle = Callable[[bool], object]


class Placed(NamedTuple):
    """One adapter in the model.

    Attributes:
        holder: The module that holds the adapter and its hooks.
        sites: The sites that the forward must pass for the adapter to be called; the last one is where it acts.
    """

    holder: Holder
    sites: tuple[Site, ...]


class ChangedLayer(NamedTuple):
    """A layer that was changed by hand.

    Attributes:
        switch: Switches the change in this layer off (False) and on (True).
        addition: Maps the layer's input to what the change adds to its output; None if the change is more than that.
    """

    switch: Toggle
    addition: Callable[[Tensor], Tensor] | None


@dataclass
class EditLog:
    """The record of one tuner's edits. The verbs of `Edit` write it, the framework reads it.

    Attributes:
        label: The attachment's name as part of state_dict keys: letters, digits and _, others replaced by _.
        placed: The adapters that verbs put in.
        unfrozen: The backbone's own parameters that train.
        unused: Parameters that the tuner asked for and that no gradient reaches.
        left_fixed: Parameters that the tuner asked for and that stay frozen: the model's author has fixed them.
        train_modules: The backbone's own modules that go to train mode.
        added_parameters: Parameters that the tuner put in by hand.
        added_modules: Modules that the tuner put in by hand; they go to train mode and their buffers are saved.
        added_buffers: Single buffers that are saved, by the module that holds them and their name there.
        sparse: Entries of the backbone's own parameters that train.
        zeros: Entries of added parameters that stay zero, and do not count.
        calibration: Records that the method was calibrated; None for a method that needs no calibration.
        wrappers: Modules that the tuner put around the backbone's own; they go to train mode, those inside do not.
        toggles: Called with False when the attachment is disabled and with True when it is enabled again.
        enable_checks: Called before the attachment is enabled again; they raise AttachError to forbid it.
        changed_layers: Layers that were changed by hand and can be switched one by one.
        changes_all_rows: True if something else was changed by hand, which affects every row of a batch.
        merges: Called on merge, to fold in an edit made by hand.
        undo_steps: Called on detach, the last one first.
        is_undone: True once the attachment was detached or merged.
    """

    label: str
    placed: list[Placed] = field(default_factory=list)
    unfrozen: list[nn.Parameter] = field(default_factory=list)
    unused: list[nn.Parameter] = field(default_factory=list)
    left_fixed: list[nn.Parameter] = field(default_factory=list)
    train_modules: list[nn.Module] = field(default_factory=list)
    added_parameters: list[nn.Parameter] = field(default_factory=list)
    added_modules: list[nn.Module] = field(default_factory=list)
    added_buffers: list[tuple[nn.Module, str]] = field(default_factory=list)
    sparse: list[SparseParameters] = field(default_factory=list)
    zeros: list[ZeroEntries] = field(default_factory=list)
    calibration: CalibrationState | None = None
    wrappers: list[nn.Module] = field(default_factory=list)
    toggles: list[Toggle] = field(default_factory=list)
    enable_checks: list[Callable[[], object]] = field(default_factory=list)
    changed_layers: dict[nn.Module, ChangedLayer] = field(default_factory=dict)
    changes_all_rows: bool = False
    merges: list[Callable[[], object]] = field(default_factory=list)
    undo_steps: list[Callable[[], object]] = field(default_factory=list)
    is_undone: bool = False

    @property
    def can_fold(self) -> bool:
        """True if there is something to fold; weights that trained in place are already where they belong."""
        return bool(self.placed or self.merges)

    @property
    def is_calibrated(self) -> bool:
        """True if the method was calibrated, here or before it was saved, or needs no calibration."""
        return self.calibration is None or bool(self.calibration.done)

    def new_parameters(self) -> list[nn.Parameter]:
        """Return all parameters that the edit added, by verbs and by hand."""
        return [*(p for holder, _ in self.placed for p in holder.parameters()), *self.added_parameters]

    def new_tensors(self) -> list[Tensor]:
        """Return all parameters and buffers that the edit added."""
        buffers = [module._buffers.get(name) for module, name in self.new_buffers()]
        return [*self.new_parameters(), *(b for b in buffers if b is not None)]

    def new_buffers(self) -> list[TensorOwner]:
        """Return where the buffers are that the edit added: a forward, or a move to a device, may replace them."""
        roots = [*(holder for holder, _ in self.placed), *self.added_modules]
        inside = [(module, name) for root in roots for module in root.modules() for name in module._buffers]
        return [*dict.fromkeys((*inside, *self.added_buffers))]

    def full_gradients(self) -> AbstractContextManager[None]:
        """Leave gradients at the parameters of which some entries train, of all entries, inside the context."""
        return full_gradients(self.sparse)

    def set_enabled(self, on: bool) -> None:
        """Enable or disable every adapter, and everything that was changed by hand."""
        for holder, _ in self.placed:
            holder.clear()
            holder.enabled = on
        for toggle in self.toggles if on else reversed(self.toggles):
            toggle(on)

    def check_open(self) -> None:
        """Check that edits can still be recorded.

        Raises:
            AttachError: The attachment was detached or merged: nothing would undo them.
        """
        if self.is_undone:
            raise AttachError(
                f"an edit of {self.label} was used after detach or merge. Attach the method again: its `attach` gets a "
                "new edit"
            )

    def undo(self) -> None:
        """Undo every edit, the last one first; the model is as it was."""
        self.is_undone = True
        for holder, _ in self.placed:
            holder.clear()
        while self.undo_steps:
            self.undo_steps.pop()()
