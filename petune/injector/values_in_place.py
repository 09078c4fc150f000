"""The values of tensors that several attachments train in place: which the model holds, and which wait."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from petune.base.errors import AttachError
from petune.injector.trained_parts import TensorValues, TrainedParts


class ValuesInPlace:
    """Exchange the values of what attachments train in place, when one is added, enabled or disabled.

    The model holds the value of the last enabled attachment that trains a tensor or, without one, the original.

    Attributes:
        attachments: What each attachment trains, in the order of attaching; the trainable state adds and removes them.
    """

    def __init__(self, attachments: dict[str, TrainedParts]) -> None:
        self.attachments = attachments

    def add(self, name: str, tensors: Mapping[str, Tensor], *, keep_original: bool) -> None:
        """Let an attachment train tensors that were in the model before it was attached.

        Args:
            name: The attachment.
            tensors: By state_dict key.
            keep_original: Keep a copy of their values.
        """
        known = {id(v.tensor): v for other in self.attachments.values() for v in other.in_place.values()}
        for key, tensor in tensors.items():
            copied = tensor.detach().clone() if keep_original else None
            values = known.get(id(tensor)) or TensorValues(tensor, copied)
            current = self._current_trainer(values)
            if current is not None:
                values.trained[current] = copied
            values.trained[name] = None
            self.attachments[name].in_place[key] = values

    def remove(self, parts: TrainedParts, name: str) -> None:
        """Forget an attachment that was taken out of `attachments`, with what it trained.

        If the model still holds its value, as after a failed `attach`, that is the value of the one before it.
        """
        for values in parts.in_place.values():
            is_in_model = values.trained.pop(name, None) is None
            current = self._current_trainer(values)
            if is_in_model and current is not None:
                values.trained[current] = None

    @torch.no_grad()
    def set_enabled(self, name: str, on: bool, live: Mapping[str, Tensor]) -> None:
        """Enable or disable an attachment: exchange the values of what it trains in place.

        Args:
            name: The attachment.
            on: True to enable it.
            live: By state_dict key, the tensors that it trains in place, as they are in the model now.
        """
        parts = self.attachments[name]
        stacks = {key: parts.in_place[key] for key in live if key in parts.in_place}
        before = {key: self._current_trainer(values) for key, values in stacks.items()}
        parts.enabled = on
        for key, values in stacks.items():
            tensor, old, new = live[key], before[key], self._current_trainer(values)
            if old == new:
                continue
            if old is not None:
                values.trained[old] = tensor.detach().clone()
            value = values.original
            if new is not None:
                value = values.trained[new]
                values.trained[new] = None
            # a buffer of another shape was made by the model's own forward (ConViT) and is left alone
            if value is not None and value.shape == tensor.shape:
                tensor.copy_(value)

    def value(self, name: str, key: str, live: Tensor) -> Tensor:
        """Return the value that the model has at `key` while the attachment `name` is enabled.

        Args:
            name: The attachment.
            key: A state_dict key.
            live: What the model has there now.
        """
        parts = self.attachments.get(name)
        if parts is None or key not in parts.in_place:
            return live
        trained = parts.in_place[key].trained
        order = list(trained)
        own_or_later = order[order.index(name) :]
        if any(self.attachments[other].enabled for other in own_or_later):
            return live
        kept = trained[name]
        return live if kept is None else kept

    def value_before_later(self, name: str, key: str, live: Tensor) -> Tensor:
        """Return the value that a tensor had before attachments made after `name` trained it in place.

        Raises:
            AttachError: That value was not kept.
        """
        order = list(self.attachments)
        later = [self.attachments[other] for other in order[order.index(name) :]]
        for entries in (e for parts in later for e in parts.sparse):
            if any(live is p for p in entries.targets):
                return entries.original(live)  # no other attachment trains it
        values = next((v for p in self.attachments.values() for v in p.in_place.values() if v.tensor is live), None)
        enabled = [other for other in values.trained if self.attachments[other].enabled] if values is not None else []
        # if an earlier attachment trains it too, that one saves the current value, see `value`
        if values is None or not enabled or order.index(enabled[0]) <= order.index(name):
            return live
        if values.original is None:
            raise AttachError(
                f"{name} needs the value of {key} from before a later attachment trained it, and that was not kept. "
                "Attach what trains the backbone's own tensors with keep_original=True"
            )
        return values.original

    def trainer_of(self, key: str, parameter: Tensor | None, other_than: str) -> str | None:
        """Return another attachment that trains the tensor at `key` in place and has kept its original value."""
        for name, parts in self.attachments.items():
            values = parts.in_place.get(key)
            if name != other_than and values is not None and values.original is not None:
                return name
        return self.sparse_trainer_of(parameter, other_than)

    def sparse_trainer_of(self, parameter: Tensor | None, other_than: str = "") -> str | None:
        """Return another attachment that trains some entries of a parameter."""
        for name, parts in self.attachments.items():
            if name != other_than and any(p is parameter for entries in parts.sparse for p in entries.targets):
                return name
        return None

    def make_original(self, name: str, live: Mapping[str, Tensor]) -> None:
        """Make the values that an attachment trained in place those that others give back when they are disabled.

        Attachments from before it that are enabled go on from them, too: their own have had no effect since.

        Args:
            name: The attachment, which is enabled and is removed next.
            live: See `set_enabled`.
        """
        for key, values in self.attachments[name].in_place.items():
            kept = values.trained[name]
            merged = live[key] if kept is None and key in live else kept
            order = list(values.trained)
            if len(order) == 1 or merged is None:
                continue
            values.original = merged.detach().clone()
            enabled = [other for other in order[: order.index(name)] if self.attachments[other].enabled]
            for other in enabled:
                is_next = kept is None and other == enabled[-1]
                values.trained[other] = None if is_next else merged.detach().clone()

    def _current_trainer(self, values: TensorValues) -> str | None:
        """Return the attachment whose value the model holds: the last one that is enabled."""
        return next((name for name in reversed(values.trained) if self.attachments[name].enabled), None)
