"""Attach the first adapter of each kind for a bank; take over only the values of the others."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from petune.adapters.fingerprint import is_converted, tensor_state
from petune.adapters.format import SavedAdapter
from petune.adapters.reference_logits import have_same_features
from petune.base.errors import CheckpointError
from petune.injector.bank_hold import BankHold
from petune.injector.fits import check_reference_logits
from petune.injector.keys import label_of
from petune.injector.load import attach_saved
from petune.injector.renamed import with_current_keys
from petune.injector.trainable import trainable_state_of
from petune.serving.bank_forward import BankForward
from petune.serving.bank_heads import check_same_head, head_for, head_keys, head_slots, head_values, traces_at
from petune.serving.bank_kind import AdapterKind, AdapterValues, Owner, kind_key
from petune.serving.mixed_batch import sharing_key
from petune.serving.sharing_check import bypassed_modules, can_share, edited_modules, recorded_calls
from petune.serving.taken_over import Alone, check_taken_over, computed_alone


class KindLoader:
    """Makes values of saved adapters, on a model on which no adapter of the bank is active."""

    def __init__(self, forward: BankForward, bank: object) -> None:
        self._forward = forward
        self._model = forward.model
        self._kinds: dict[str, AdapterKind] = {}
        self._attached: list[AdapterKind] = []
        self._hold = BankHold(bank, self.release)
        self._backbone = [*self._model.parameters(), *self._model.buffers()]
        self._state = self._current_state()

    def load(self, name: str, saved: SavedAdapter) -> Owner:
        """Return a saved adapter's kind, which is attached if this is the first one of it, and its values.

        Raises:
            PetuneError: See `AdapterBank.load`.
        """
        check_same_head(self._forward.head, saved)
        self._follow_backbone()
        key = kind_key(saved, {*head_keys(saved, self._forward.head).values()})
        kind = self._kinds.get(key)
        if kind is None:
            owner = self._attach(name, saved)
            self._state = self._current_state()
            assert owner.kind is not None
            self._kinds[key] = owner.kind
            return owner
        owner = Owner(kind, self.values(kind, saved))
        if not have_same_features(kind.features, _features(saved)):
            with self._forward.activated(owner):
                check_reference_logits(kind.attachment, saved)
        return owner

    def _follow_backbone(self) -> None:
        """Forget what is proven about the backbone if it has other values now; a conversion keeps them."""
        state = self._current_state()
        pairs = zip(self._state, state, strict=True)
        if not all(was == now or (was[0] == now[0] and is_converted(was[1], now[1])) for was, now in pairs):
            self._kinds.clear()
        else:
            self._state = state

    def values(self, kind: AdapterKind, saved: SavedAdapter) -> AdapterValues:
        """Return the values of a saved adapter of this kind."""
        with self._forward.head_of(kind):
            if kind.file_keys is None:
                saved = with_current_keys(kind.attachment, saved)
            return kind.values_from(saved, self._head_values(saved))

    def release(self) -> None:
        """Take everything from the model, whose bank was deleted."""
        if self._forward.active.kind is not None:
            warnings.warn(
                "an adapter of an AdapterBank that was deleted was in use. It is taken out of the model now",
                stacklevel=5,
            )
            self._forward.deactivate(self._forward.active)
        for kind in [*self._attached]:
            self.detach(kind)

    def detach(self, kind: AdapterKind) -> None:
        """Take a kind without adapters from the model."""
        self._attached.remove(kind)
        self._kinds = {key: other for key, other in self._kinds.items() if other is not kind}
        is_unchanged = self._current_state() == self._state
        current = self._model.get_submodule(self._forward.head.path)  # the user may have put another one in
        self._forward.set_head(kind.head)
        try:
            kind.attachment.detach()
        finally:
            self._forward.set_head(current)
        if is_unchanged:
            self._state = self._current_state()

    def _attach(self, name: str, saved: SavedAdapter) -> Owner:
        kind, alone = self._new_kind(name, saved)
        try:
            with self._forward.head_of(kind):
                current = with_current_keys(kind.attachment, saved)
                if current.tensors.keys() == saved.tensors.keys():
                    kind.learn_file_keys(saved)
                owner = Owner(kind, kind.current_values(self._head_values(current)))
            check_taken_over(owner, alone, self._forward)
            self._prepare_sharing(owner)
        except BaseException:
            self.detach(kind)
            raise
        return owner

    def _new_kind(self, name: str, saved: SavedAdapter) -> tuple[AdapterKind, Alone]:
        """Attach an adapter, at a classifier of its own, and disable it; return also what it computes there."""
        site = self._forward.head
        head = head_for(site, saved)
        traces, slots = traces_at(head), [*head_slots(head).values()]
        head_site = replace(site, enter=head, exit=head)
        sites = replace(self._forward.sites, parts={**self._forward.sites.parts, "head": head_site})
        try:
            self._forward.set_head(head)
            with self._released():
                attachment = attach_saved(self._model, saved, name=self._free_name(name), sites=sites)
            acting = self._model.get_submodule(site.path)
            kind = AdapterKind(attachment, acting, slots)
            kind.acts_at_head = traces_at(acting) != traces or kind.trains_inside(acting)
            self._attached.append(kind)
            kind.features = _features(saved)
            kind.config = saved.config
            kind.tensor_keys = {*saved.tensors}
            alone = self._computed_alone(kind)
        finally:
            self._forward.set_head(site.enter)
        acting.eval()
        self._model.eval()
        return kind, alone

    def _computed_alone(self, kind: AdapterKind) -> Alone:
        try:
            alone = computed_alone(kind, self._forward)
            kind.attachment.disable()
        except BaseException:
            self.detach(kind)
            raise
        return alone

    @contextmanager
    def _released(self) -> Iterator[None]:
        """Let adapters be attached inside the context; outside of it, only the bank attaches and detaches."""
        try:
            self._set_hold(None)
            yield
        finally:
            self._set_hold(self._hold)

    def _set_hold(self, hold: BankHold | None) -> None:
        state = trainable_state_of(self._model)
        if state is not None:
            state.bank_hold = hold
            state.is_bank_loading = hold is None

    def _prepare_sharing(self, owner: Owner) -> None:
        """Find out whether adapters of this kind can share a forward."""
        kind = owner.kind
        assert kind is not None
        key = sharing_key(kind) if self._forward.head_is_last else None
        if key is None or kind.acts_at_head or self._acts_behind_head(kind):
            return
        with recorded_calls(self._model) as called:
            self._forward.features([Owner()])
        if any(layer.addition is None for layer in kind.log.changed_layers.values()):
            with recorded_calls(self._model) as still_called:
                self._forward.features([owner])
            kind.bypassed = bypassed_modules(kind, still_called)
        edited = edited_modules(kind, called)
        if edited is not None:
            kind.edited = edited
            kind.sharing = key
            kind.is_elementwise = self._is_elementwise(owner)
            if kind.slots.slots and not kind.is_elementwise and not can_share(owner, self._forward.features):
                kind.sharing = None

    def _acts_behind_head(self, kind: AdapterKind) -> bool:
        """Return True if an adapter is at a module around the classifier, such as the model itself."""
        head = self._forward.head.enter
        ends = {module for _, sites in kind.log.placed for site in sites for module in (site.enter, site.exit)}
        return any(head in {*module.modules()} for module in ends)

    def _is_elementwise(self, owner: Owner) -> bool:
        """Return True if rows with a vector each compute what each computes alone."""
        kind = owner.kind
        assert kind is not None
        if not any(kind.has_vectors(holder) for holder in kind.slots_of_holder):
            return False
        kind.is_elementwise = True
        try:
            return can_share(owner, self._forward.features)
        except Exception:  # an adapter may use a vector in any other way
            return False

    def _head_values(self, saved: SavedAdapter) -> list[Any] | None:
        values = head_values(saved, self._forward.head, self._forward.head_slots)
        if values is None and saved.config["train_head"]:
            raise CheckpointError(f"{saved.path} has no tensors of the classifier {self._forward.head.path}")
        return values

    def _free_name(self, name: str) -> str:
        """Return a name that no attachment has: an earlier adapter of this name may live on as that of its kind."""
        state = trainable_state_of(self._model)
        taken = set() if state is None else set(state.attachments)
        free, number = name, 1
        while label_of(free) in taken:
            free, number = f"{name}_{number}", number + 1
        return free

    def _current_state(self) -> list[Any]:
        """Return what changes with the backbone's own values."""
        present: set[int] = {id(t) for t in (*self._model.parameters(), *self._model.buffers())}
        return [(id(t) in present, tensor_state(t)) for t in self._backbone]


def _features(saved: SavedAdapter) -> Any:
    """Return what the file says about the output of the backbone alone; None for older files."""
    reference = saved.config.get("reference_logits")
    return reference.get("backbone_features") if isinstance(reference, dict) else None
