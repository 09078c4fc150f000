"""The tensors of one attachment: which train, which are saved, which were in the model before."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from petune.adapters.fingerprint import digest, fingerprint, named_digest
from petune.adapters.trained_on import backbone_dtype
from petune.adapters.unwrapped import wrapped_key
from petune.base.errors import AttachError
from petune.base.text import plural
from petune.injector.addresses import addresses_of
from petune.injector.counts import Counts, count_parameters
from petune.injector.edit_log import EditLog
from petune.injector.frozen import block_indices, content_only, frozen_backbone, frozen_head
from petune.injector.keys import (
    buffer_owners,
    label_of,
    named_parameters,
    non_persistent_buffers,
    persistent_buffers,
    renamed_key,
)
from petune.injector.sparse import SparseParameters
from petune.injector.trainable import added_to, buffers_added_to, trainable_state_of
from petune.injector.trained_parts import TrainedParts
from petune.sites.sites import Sites


class AdapterTensors:
    """The tensors that one attachment trains and saves.

    Attributes:
        tuned: The method's trainable parameters, by state_dict key.
        fixed: Parameters that the tuner added with requires_grad=False: saved as buffers are, and not trained.
        head: The classifier's trainable parameters, by state_dict key; empty if it does not train.
        head_modules: The modules of the classifier, whether it trains or not.
        addresses: By state_dict key of what is saved, where it belongs in any version of the model's library.
        is_sharded: The frozen backbone is spread over processes; see `keep_fingerprint`.
    """

    def __init__(self, model: nn.Module, sites: Sites, log: EditLog, method: str, *, train_head: bool) -> None:
        self.is_sharded = False
        self._model = model
        self._sites = sites
        self._log = log
        self._method = method
        head = sites.head if train_head else sites.parts.get("head")
        self.head_modules = tuple(head.modules) if head is not None else ()
        classifier = {id(p) for m in self.head_modules for p in m.parameters()}
        new = log.new_parameters()
        tuned = {id(p) for p in new if p.requires_grad} | {id(p) for p in log.unfrozen} - classifier
        fixed = {id(p) for p in new} - tuned
        named = named_parameters(model)
        self.tuned = {key: p for key, p in named.items() if id(p) in tuned}
        self.fixed = {key: p for key, p in named.items() if id(p) in fixed}
        self.head = {key: p for key, p in named.items() if id(p) in classifier} if train_head else {}
        self._modules = self._modules_in_train_mode(self.head_modules if train_head else ())
        adapters = [owner for holder, _ in log.placed for owner in persistent_buffers(holder)]
        own = {module for root in log.added_modules for module in root.modules()}
        tables = non_persistent_buffers(m for m in self._modules if m not in own) - {*log.added_buffers}
        # a block that trains as a whole may hold what another attachment added
        others = buffers_added_to(model) - {*log.new_buffers()}
        owners = buffer_owners(model, self._modules, [*log.added_buffers, *adapters], left_out=others)
        self._buffers = {key: owner for key, owner in owners.items() if owner not in tables}
        self._adapter_buffers = {*adapters}
        self._fingerprint: str | None = None
        self.addresses = addresses_of(model, sites, log, self.live(), self._buffers)

    def parts(self) -> TrainedParts:
        """Return what the model's trainable state needs to know."""
        return TrainedParts(
            parameters=(*self.tuned.values(), *self.head.values()),
            added=tuple(self._log.new_parameters()),
            added_buffers=tuple(self._log.new_buffers()),
            modules=self._modules,
            sparse=tuple(self._log.sparse),
        )

    def counts(self) -> Counts:
        """Count what trains, and the whole model."""
        named, classifier = named_parameters(self._model), {id(p) for m in self.head_modules for p in m.parameters()}
        added = {id(p) for p in self._log.new_parameters()} | added_to(self._model)
        entries = {id(m.values) for m in self._model.modules() if isinstance(m, SparseParameters)}
        counts = count_parameters(named, self.tuned, self.head, added, classifier, entries)
        num_zeros = sum(zeros.count for zeros in self._log.zeros)
        return replace(counts, tuned=counts.tuned - num_zeros)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the tuned and head parameters, by state_dict key."""
        return {**self.tuned, **self.head}

    def with_gradients(self) -> list[nn.Parameter]:
        """Return the tuned parameters, and those of the backbone whose gradients some of them are made from."""
        return [*self.tuned.values(), *(p for entries in self._log.sparse for p in entries.targets)]

    def live(self) -> dict[str, Tensor]:
        """Return what is saved, by state_dict key: parameters, and the buffers that move with them.

        They are the model's tensors as they are now, also while the attachment is disabled.
        """
        buffers = {key: module._buffers[name] for key, (module, name) in self._buffers.items()}
        return {**self.tuned, **self.fixed, **self.head, **{key: b for key, b in buffers.items() if b is not None}}

    def saved(self) -> dict[str, Tensor]:
        """Return the tensors of `live`; while the attachment is disabled, with the values that it trained."""
        live = self.live()
        state = trainable_state_of(self._model)
        return live if state is None else {key: state.values.value(self._log.label, key, t) for key, t in live.items()}

    def file_key(self, key: str) -> str:
        """Return the key in an adapter's file, which names the method and not the attachment."""
        return renamed_key(key, f"petune_{self._log.label}", f"petune_{label_of(self._method)}")

    def shape_buffers(self, like: Mapping[str, Tensor]) -> set[str]:
        """Make room for the values of adapter buffers whose shape the adapter's forward decides.

        Args:
            like: By the file's key, tensors of the shape and dtype that the buffers are to have.

        Returns:
            The file's keys of all buffers of adapters that verbs put in, also of those that are None.
        """
        keys = {self.file_key(key): owner for key, owner in self._buffers.items() if owner in self._adapter_buffers}
        for key in keys.keys() & like.keys():
            module, name = keys[key]
            buffer = module._buffers[name]
            if buffer is None or buffer.shape != like[key].shape:
                near = next(t for t in (*module.parameters(), *self._model.parameters()))
                module._buffers[name] = torch.empty_like(like[key], device=near.device)
        return {*keys}

    def in_place(self) -> dict[str, Tensor]:
        """Return the tensors that were in the model before attaching and that training may change."""
        added = {id(t) for t in self._log.new_tensors()}
        return {key: t for key, t in self.live().items() if id(t) not in added}

    def head_is_in_model(self) -> bool:
        """Return False if the model has another classifier now, such as another task's."""
        return {*self.head_modules} <= {*self._model.modules()}

    def check_left_head(self, name: str) -> None:
        """Check that a classifier that does not train is still the one from when the attachment was made.

        Args:
            name: The attachment, for messages.

        Raises:
            AttachError: The model has another one.
        """
        if not self.head and not self.head_is_in_model():
            raise AttachError(
                f"{self._sites.model} has another classifier than when {name} was attached with train_head=False. "
                "Change the classifier first and attach then"
            )

    def are_alone(self) -> bool:
        """Return True if no other attachment is enabled, and the classifier in the model is this attachment's."""
        state = trainable_state_of(self._model)
        if state is None or not self.head_is_in_model():
            return False
        return not any(parts.enabled for name, parts in state.attachments.items() if name != self._log.label)

    def fingerprint(self, also_frozen: Collection[str] = (), left_out: Collection[str] = ()) -> str:
        """Return the SHA-256 of the contents of the frozen backbone; see `petune.adapters.fingerprint`.

        Args:
            also_frozen: Keys that train now, and were frozen when the adapter was saved.
            left_out: Keys that are frozen now, and trained when the adapter was saved.

        Raises:
            AttachError: A later attachment trains some of it in place, and did not keep the values from before.
        """
        if self._fingerprint is not None:
            return self._fingerprint
        frozen = content_only(self._model, self._frozen(also_frozen, left_out))
        return fingerprint(self._model, frozen, block_indices(self._model, self._sites))

    def describe_frozen(self) -> dict[str, Any]:
        """Return what the configuration of an adapter says about the frozen backbone and classifier."""
        fixed = {id(p) for p in self._log.left_fixed}
        keys = sorted(key for key, p in named_parameters(self._model).items() if id(p) in fixed)
        return {
            "backbone_dtype": backbone_dtype(self._model),
            "fingerprint": self.fingerprint(),
            "head_fingerprint": self.head_fingerprint(),
            **({"left_fixed": keys} if keys else {}),
        }

    def named_fingerprint(
        self, wrapper: str | None, also_frozen: Collection[str] = (), left_out: Collection[str] = ()
    ) -> str:
        """Return the SHA-256 of the frozen backbone with the names of its tensors, as in adapters up to format 3.

        Args:
            wrapper: Compute that of an adapter which was trained in this wrapper; see `petune.adapters.unwrapped`.
            also_frozen, left_out: See `fingerprint`.
        """
        frozen = self._frozen(also_frozen, left_out)
        return named_digest({wrapped_key(key, wrapper): t for key, t in frozen.items()})

    def _frozen(self, also_frozen: Collection[str], left_out: Collection[str]) -> dict[str, Tensor]:
        own = {key: t for key, t in self.live().items() if key not in also_frozen}
        is_trained = bool(self.head)
        frozen = frozen_backbone(self._model, self._sites, self._log.label, own, train_head=is_trained)
        return {key: t for key, t in frozen.items() if key not in left_out}

    def keep_fingerprint(self) -> None:
        """Compute the fingerprint now, before the frozen tensors are sharded and cannot be read by one process."""
        self._fingerprint = self.fingerprint()
        self.is_sharded = True

    def head_fingerprint(self) -> str | None:
        """Return the SHA-256 of a classifier that does not train; None if it trains, or there is none."""
        tensors = self._frozen_head()
        return None if tensors is None else digest(content_only(self._model, tensors))

    def named_head_fingerprint(self, wrapper: str | None) -> str | None:
        """Return what `head_fingerprint` was up to format 3; see `named_fingerprint`."""
        tensors = self._frozen_head()
        return None if tensors is None else named_digest({wrapped_key(key, wrapper): t for key, t in tensors.items()})

    def _frozen_head(self) -> dict[str, Tensor] | None:
        return None if self.head else frozen_head(self._model, self._sites, self._log.label, self.live())

    def check_in_model(self, name: str, *, active: bool, only: Mapping[str, Tensor] | None = None) -> None:
        """Check that the tensors that train, or `only` some of them, are still the model's.

        Args:
            name: The attachment, for the message.
            active: True if it is enabled; the classifier of a disabled task may be elsewhere.
            only: By state_dict key.

        Raises:
            AttachError: The model has others in their place.
        """
        tuned = self.tuned if only is None else {key: p for key, p in self.tuned.items() if key in only}
        in_model = {id(p) for p in self._model.parameters()} if tuned else set()
        in_head = {id(p) for m in self.head_modules for p in m.parameters()}
        if only is None and active and self.head and not self.head_is_in_model():
            in_head = set()
        replaced = [key for key, p in tuned.items() if id(p) not in in_model]
        replaced += [key for key, p in self.head.items() if id(p) not in in_head]
        if replaced:
            raise AttachError(
                f"the model has others instead of {plural(len(replaced), 'tensor')} that {name} trains, such as "
                f"{', '.join(replaced[:3])}: replaced by load_state_dict(…, assign=True) or a new classifier. "
                "Change the model first and attach then; load values without assign=True"
            )

    def _modules_in_train_mode(self, head_modules: tuple[nn.Module, ...]) -> tuple[nn.Module, ...]:
        """Return the modules that follow `train()`: unfrozen ones, the tuner's, and those of a head that trains."""
        roots = [*self._log.train_modules, *self._log.added_modules, *head_modules]
        own = {id(m) for holder, _ in self._log.placed for m in holder.modules()}
        added = {id(m) for h in self._model.modules() if hasattr(h, "is_petune_module") for m in h.modules()}
        inside = (m for root in roots for m in root.modules() if id(m) in own or id(m) not in added)
        return (*inside, *self._log.wrappers)
