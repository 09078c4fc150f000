"""`Attachment`: a tuner on a model, what of it trains, and how it is switched, saved, merged and taken off."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from petune.base.arguments import PathText, check_arguments
from petune.base.config import expand_home
from petune.base.errors import AttachError, DeadSite, NotMergeable
from petune.injector.counts import count_parameters
from petune.injector.edit_log import EditLog
from petune.injector.trainable import (
    Claim,
    added_to,
    buffer_places,
    named_parameters,
    open_trainable_state,
    trainable_state_of,
)
from petune.injector.tuner import Tuner
from petune.sites.forward import forget_caches
from petune.sites.logits import synthetic_logits
from petune.sites.site import Sites


class Attachment:
    """A tuner on a model.

    Attributes:
        model, tuner, name: What was attached to what, and as what.
        sites: The model's places.
        tuned, head: Trainable parameters by state_dict key.
        counts: How many.
        edit_log: What was done to the model.
        fingerprint: Of the frozen tensors, where they cannot be read any more; None is worked out when saving.
        attached, enabled: Whether it still is, and whether it takes effect now.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sites,
        tuner: Tuner[Any],
        name: str,
        edit_log: EditLog,
        train_head: bool,
        keep_original: bool,
    ) -> None:
        self.model, self.sites, self.tuner, self.name = model, sites, tuner, name
        self.edit_log, self._train_head, self.attached, self.enabled = edit_log, train_head, True, True
        self.fingerprint: str | None = None
        head = sites.head if train_head else sites.parts.get("head")
        self._head_modules = tuple(head.modules) if head is not None else ()
        classifier = {id(p) for m in self._head_modules for p in m.parameters()}
        added = {id(p) for p in edit_log.new_parameters()}
        tuned = added | {id(p) for p in edit_log.unfrozen} - classifier
        named = named_parameters(model)
        self.tuned = {key: p for key, p in named.items() if id(p) in tuned}
        self.head = {key: p for key, p in named.items() if id(p) in classifier} if train_head else {}
        moving = tuple(self._moving_modules())
        self._buffers = buffer_places(model, moving, edit_log.added_buffers)
        self.counts = count_parameters(named, self.tuned, self.head, added | added_to(model), classifier)
        changing = self._changing() if keep_original else {}
        self._originals = {k: (t, t.detach().clone()) for k, t in changing.items()} if keep_original else None
        ledger = open_trainable_state(model, self.sites)
        claim = Claim(
            (*self.tuned.values(), *self.head.values()), tuple(edit_log.new_tensors()), moving, self._originals
        )
        ledger.claim(edit_log.name, claim)

    def parameters(self) -> list[nn.Parameter]:
        """What an optimizer takes: tuned and head.

        Raises:
            AttachError: The model has another tensor in the place of one of them.
        """
        self._need_own()
        return [*self.tuned.values(), *self.head.values()]

    def train(self, mode: bool = True) -> nn.Module:
        """`model.train(mode)`; what is frozen stays in eval mode either way."""
        return self.model.train(mode)

    def on_train_start(self, total_steps: int) -> None:
        """Tell the tuner how many steps the training has, before the first and before a resume."""
        self.tuner.on_train_start(total_steps)

    def on_step_end(self, step: int) -> None:
        """Tell the tuner that the optimizer has done this step (from 0), while the gradients are still there."""
        self.tuner.on_step_end(step)

    def loss(self, step: int) -> Tensor | float:
        """The tuner's own term of the loss at this step, 0.0 where it has none."""
        term = self.tuner.loss(step)
        return 0.0 if term is None else term

    def check_gradients(self, *, under_way: bool = False) -> None:
        """After a backward: every adapter and head parameter has a gradient, once `under_way` not all zero.

        Raises:
            DeadSite: Some have none, they are named; or all adapters have zeros, so that nothing of them would train.
            AttachError: See `parameters`.
        """
        self._need_own()
        dead = self.without_effect({k for k, p in {**self.tuned, **self.head}.items() if p.grad is None})
        if dead:
            raise DeadSite(
                f"every parameter of {self.name} must get a gradient, but {len(dead)} got none, as "
                f"{', '.join(dead[:3])}: {self.sites.model} does not use "
                "them in its output. Use another method on this model"
            )
        parts = (self.tuned, self.head) if under_way and self.tuned else ()  # where the head rests too, all is learned
        if [any(p.grad is not None and p.grad.any() for p in part.values()) for part in parts] == [False, True]:
            raise DeadSite(
                f"{self.name} must learn, but all gradients of its {len(self.tuned)} tensors are zero. Look at its "
                "options (a scale of 0, a dropout of 1) or use another method"
            )

    def without_effect(self, silent: set[str]) -> list[str]:
        """Of the trainable parameters that got no gradient, by key, those that must have got one.

        A backbone may own parameters that its output never uses, as DINOv2's mask token in transformers: where some of
        its own train, the others may stay as they are.
        """
        own = {key for key, p in self.tuned.items() if any(p is q for q in self.edit_log.unfrozen)}
        return sorted(silent - own if own - silent else silent)

    def state(self) -> dict[str, Tensor]:
        """What is saved: tuned and head tensors, and the buffers that move with them, by state_dict key.

        They are the model's own tensors; while the attachment is off, of what it trains in place those kept aside.
        """
        ledger = trainable_state_of(self.model)
        live = self.live_state()
        return live if ledger is None else {key: ledger.value(self.edit_log.name, key, t) for key, t in live.items()}

    def live_state(self) -> dict[str, Tensor]:
        """The tensors of `state` as they are in the model now, also while the attachment is off."""
        buffers = {key: module._buffers[name] for key, (module, name) in self._buffers.items()}
        return {**self.tuned, **self.head, **{key: b for key, b in buffers.items() if b is not None}}

    def save(self, path: str | Path, *, metadata: Mapping[str, Any] | None = None) -> None:
        """Write the adapter directory; see `petune.state.save`.

        Raises:
            AttachError: Detached or merged, or see `parameters`: what was trained is not there any more.
        """
        from petune.injector.load import save

        self._need_attached()
        self._need_own()
        self._need_same_head()
        check_arguments("save", path=(path, PathText), metadata=(metadata, Mapping | None))
        save(self, expand_home(path), metadata)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model computes what it did before attaching, bit for bit.

        What trains in place, the classifier above all, is exchanged: not between a forward and its backward. To learn
        from the backbone's own logits, ask for them first.

        Raises:
            AttachError: The attachment trains backbone or head, and was made with keep_original=False.
        """
        was = self.enabled
        self.disable()
        try:
            yield
        finally:
            if was:
                self.enable()

    def enable(self) -> None:
        """Let the attachment take effect again after `disable`, with the values that it has trained in place.

        Raises:
            AttachError: See `disable`; or what another attachment has enabled is in the way, as prompts. Nothing has
                changed.
        """
        self._need_attached()
        if self.enabled:
            return
        for check in self.edit_log.enable_checks:
            check()
        self._set_enabled(True)

    def disable(self) -> None:
        """Let the model compute what it did before attaching, bit for bit, until `enable`.

        What trains in place, the classifier above all, is exchanged: not between a forward and its backward.

        Raises:
            AttachError: The attachment trains backbone or head, and was made with keep_original=False; or the model
                has other tensors now, see `parameters`. Nothing has changed.
        """
        self._need_attached()
        if self.enabled:
            self._set_enabled(False)

    def _set_enabled(self, on: bool) -> None:
        changing = self._exchangeable()
        self.edit_log.set_enabled(on)
        self._exchange(on, changing)
        self.enabled = on

    def detach(self) -> None:
        """Give the model back as it was before attaching: keys, flags and values.

        What a later attachment trains too keeps its value, and goes back to ours when that one is detached.

        Raises:
            AttachError: See `disabled` and `parameters`.
        """
        self._need_attached()
        self._exchange(False, self._exchangeable())
        open_trainable_state(self.model, self.sites).bequeath(self.edit_log.name)
        self.edit_log.undo()
        self.attached = False

    def merge(self) -> None:
        """Fold the adapters into the backbone's weights and remove them; trained weights stay as they are.

        Raises:
            NotMergeable: An adapter is no change of weights, or of weights that another attachment trains in place; the
                reason is named and nothing was changed.
        """
        was = self.enabled
        self.enable()
        self._need_own(self._changing())
        if self.edit_log.can_fold:
            try:
                self._fold()
            except BaseException:
                if not was:
                    self.disable()
                raise
        self.edit_log.undo()
        self.attached = False

    def _fold(self) -> None:
        """Fold, and compare what the model makes of an image before and after; put everything back if they differ."""
        before = {key: t.detach().clone() for key, t in self.model.state_dict().items() if isinstance(t, Tensor)}
        expected = synthetic_logits(self.model, self.sites)
        try:
            self.edit_log.fold(self.name)
            self._refuse_shared(before)
            self.edit_log.set_enabled(False)
            change = float(
                (synthetic_logits(self.model, self.sites) - expected).abs().max() / expected.abs().max().clamp(min=1)
            )
            if not change < (1e-3 if expected.dtype == torch.float32 else 5e-2):
                raise NotMergeable(
                    f"{self.name} computes something else when folded: its output moves by {change:.2g}. Mend the "
                    "adapter's merge",
                    changes_output=True,
                )
        except BaseException:
            self.model.load_state_dict(before, strict=False)
            self.edit_log.set_enabled(True)
            raise

    def _refuse_shared(self, before: Mapping[str, Tensor]) -> None:
        """What is folded into a tensor would be lost when an attachment that trains it gives back its value."""
        folded = [
            key for key, t in self.model.state_dict().items() if key in before and not torch.equal(t, before[key])
        ]
        ledger = open_trainable_state(self.model, self.sites)
        for key in folded:
            other = next(
                (n for n, c in ledger.claims.items() if n != self.edit_log.name and key in (c.originals or {})), None
            )
            if other is not None:
                raise NotMergeable(
                    f"{self.name} cannot be folded into {key}, which {other} trains in place: what was folded would be "
                    f"lost when {other} is disabled or detached. Merge or detach {other} first"
                )

    def _moving_modules(self) -> list[nn.Module]:
        """Modules that go to train mode: unfrozen ones, and the head's."""
        roots = [
            *self.edit_log.train_modules,
            *self.edit_log.added_modules,
            *(self._head_modules if self._train_head else ()),
        ]
        own = {id(m) for holder, _ in self.edit_log.placed for m in holder.modules()}
        added = {id(m) for h in self.model.modules() if hasattr(h, "is_petune_holder") for m in h.modules()}
        return [m for root in roots for m in root.modules() if id(m) in own or id(m) not in added]

    def _changing(self) -> dict[str, Tensor]:
        """Tensors that were there before attaching and that training may change."""
        added = {id(t) for t in self.edit_log.new_tensors()}
        return {key: t for key, t in self.live_state().items() if id(t) not in added}

    def _exchangeable(self) -> dict[str, Tensor]:
        """What is trained in place, see `_changing`, after a look whether it can be given back."""
        changing = self._changing()
        if changing and self._originals is None:
            raise AttachError(
                f"giving back the model needs the values from before {self.name}, which were not kept; "
                "attach with keep_original=True"
            )
        self._need_own(changing)
        return changing

    def _exchange(self, on: bool, changing: dict[str, Tensor]) -> None:
        """Put in what was trained in place, or what the model has without it."""
        open_trainable_state(self.model, self.sites).switch(self.edit_log.name, on, changing)
        if changing:
            forget_caches(self.model)

    def __deepcopy__(self, memo: dict[int, Any]) -> Attachment:
        raise AttachError(
            f"an attachment belongs to its own model, but {self.name} was to be copied. Copy the model, "
            "copy.deepcopy(attachment.model), which keeps its adapters; or save it, and petune.load it on another"
        )

    def _need_own(self, only: Mapping[str, Tensor] | None = None) -> None:
        """See that what trains, or `only` that of it, is still the model's: it is remembered by identity."""
        tuned = {key: p for key, p in self.tuned.items() if only is None or key in only}
        here = {id(p) for p in self.model.parameters()} if tuned else set()
        of_head = {id(p) for m in self._head_modules for p in m.parameters()}
        lost = [key for key, p in tuned.items() if self.attached and id(p) not in here]
        if only is None and self.attached and self.enabled and self.head:  # off, a task's classifier is elsewhere
            modules = {id(m) for m in self.model.modules()}
            of_head = of_head if all(id(m) in modules for m in self._head_modules) else set()
        lost += [key for key, p in self.head.items() if id(p) not in of_head]
        if lost:
            raise AttachError(
                f"{self.name} trains the tensors that were there when it was attached, but the model has others for "
                f"{len(lost)} of them, as {', '.join(lost[:3])}: load_state_dict(…, assign=True) or a new classifier "
                "took their places. Change the model first and attach then; load values without assign=True"
            )

    def _need_same_head(self) -> None:
        """See that a classifier which stays as it is is the one under which the attachment was made."""
        if self.enabled and not self.head and not {*self._head_modules} <= {*self.model.modules()}:
            raise AttachError(
                f"{self.name} belongs to the classifier that was there when it was attached (train_head=False), but "
                f"{self.sites.model} has another in its place. Change the classifier first and attach then"
            )

    def _need_attached(self) -> None:
        if not self.attached:
            raise AttachError(f"{self.name} must be attached for this, but was detached or merged before")
