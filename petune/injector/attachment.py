"""`Attachment`: a tuner on a model. What trains, and how it is trained, disabled, saved, merged and detached."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from petune.adapters.format import check_plain
from petune.adapters.reference_logits import reference_logits
from petune.base.arguments import Number, PathText, check_arguments
from petune.base.errors import AttachError
from petune.injector import gradients
from petune.injector.adapter_tensors import AdapterTensors
from petune.injector.aux_losses import AuxLosses
from petune.injector.calibrating import calibrate
from petune.injector.compiled import forget_compiled_code
from petune.injector.edit_log import EditLog
from petune.injector.loop_check import LoopCheck
from petune.injector.merge import fold
from petune.injector.param_groups import groups_by_part, undecayed_keys
from petune.injector.registry import call_hook
from petune.injector.saving import describe, recorded_outputs, write
from petune.injector.trainable import TrainableState
from petune.injector.tuner import Recipe, Tuner
from petune.injector.unfrozen import refuse_unfrozen, warn_of_changed
from petune.sites.forward import forget_caches
from petune.sites.sites import Sites


class Attachment:
    """A tuner on a model, as `petune.attach` and `petune.load` return it; `print(att)` shows what trains.

    Attributes:
        model: The model.
        sites: Its sites.
        tuner: The method.
        name: Distinguishes attachments on one model.
        tuned: The method's trainable parameters, by state_dict key.
        head: The heads' trainable parameters, by state_dict key; empty with train_head=False.
        counts: Numbers of parameters.
        tensors: What trains and what is saved, for the framework.
        edit_log: What the tuner did to the model, for the framework.
        attached, enabled: False once it was detached or merged; False while it is disabled.
        method: The method's name in the registry; the attachment's name for a tuner that is not registered.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sites,
        tuner: Tuner[Any],
        name: str,
        edit_log: EditLog,
        state: TrainableState,
        train_head: bool,
        keep_original: bool,
    ) -> None:
        self.model = model
        self.sites = sites
        self.tuner = tuner
        self.name = name
        self.method = tuner.method or name
        self.edit_log = edit_log
        self.attached = self.enabled = True
        self._keep_original = keep_original
        self.tensors = AdapterTensors(model, sites, edit_log, self.method, train_head=train_head)
        self.tuned = self.tensors.tuned
        self.head = self.tensors.head
        self.counts = self.tensors.counts()
        self._state = state
        state.set_parts(edit_log.label, self.tensors.parts(), self.tensors.in_place(), keep_original=keep_original)
        watched = self.tensors.with_gradients()
        self._aux_losses = AuxLosses(name, model, tuner, edit_log)
        self._loop_check = LoopCheck(name, self._aux_losses.training_calls, watched, lambda: edit_log.is_calibrated)
        edit_log.undo_steps.append(self._loop_check.remove)

    def __str__(self) -> str:
        state = "detached" if not self.attached else "enabled" if self.enabled else "disabled"
        options = self.tuner.config.model_dump(exclude_defaults=True)
        chosen = f" ({', '.join(f'{key}={value}' for key, value in options.items())})" if options else ""
        title = f"{self.name}: {self.method}{chosen} on {self.sites.model}, {state}\n{self.counts}"
        return "\n".join([title, *self.sites.describe_choice(), *self.sites.describe_heads()])

    def __repr__(self) -> str:
        return f"<Attachment {self.name!r}: {self.method} on {self.sites.model}>"

    @property
    def recipe(self) -> Recipe:
        """The method's own learning rate, weight decay and optimizer."""
        return self.tuner.recipe

    def parameters(self) -> list[nn.Parameter]:
        """Return what an optimizer trains: tuned and head parameters.

        Raises:
            AttachError: The model has another tensor in the place of one of them, or parameters that someone unfroze.
        """
        self._check_trainable()
        return list(self.tensors.trainable().values())

    def param_groups(self, weight_decay: float | None = None, *, head_lr: float | None = None) -> list[dict[str, Any]]:
        """Return `parameters()` in groups for an optimizer: vectors, position embedding and class token do not decay.

        Args:
            weight_decay: For the other parameters. None, the default, takes the recipe's.
            head_lr: Learning rate of the heads, in groups of their own; None gives them the optimizer's.

        Raises:
            AttachError: See `parameters`.
        """
        check_arguments("param_groups", weight_decay=(weight_decay, Number), head_lr=(head_lr, Number))
        self._check_trainable()
        decay = self.recipe.weight_decay if weight_decay is None else weight_decay
        return groups_by_part(self.tuned, self.head, decay, undecayed_keys(self.model), head_lr)

    def train(self, mode: bool = True) -> nn.Module:
        """Do `model.train(mode)`; what is frozen stays in eval mode."""
        return self.model.train(mode)

    def set_backbone_dropout(self, active: bool) -> int:
        """Let dropout and drop path of the backbone act in train mode in frozen parts, too (True), or nowhere (False).

        Without it they act in what the method trains. Return the number of the backbone's modules that drop something.
        """
        self._check_attached()
        return self._state.set_backbone_dropout(active)

    @property
    def is_calibrated(self) -> bool:
        """True if the method needs no `calibrate`, or was calibrated, here or before it was saved."""
        return self.edit_log.is_calibrated

    def calibrate(self, batches: Iterable[Any], *, loss: Callable[[Any, Any], Tensor] | None = None) -> None:
        """Let a method choose what trains, on training batches, before the first step.

        Nothing happens for methods that choose nothing, after `petune.load`, and in a resumed training.

        Args:
            batches: Pairs of inputs and target, such as a DataLoader of the training split, read as far as needed.
            loss: Maps the model's output and the target to a scalar; by default the cross-entropy of the logits.

        Raises:
            UsageError: There are no such batches, or they are of another split. Nothing has changed.
            AttachError: The attachment is disabled or detached, or see `parameters`.
        """
        self._check_attached()
        if self.is_calibrated:
            return
        if not self.enabled:
            raise AttachError(f"{self.name} is disabled. Call enable() before calibrate")
        self._check_in_model()
        with self._loop_check.paused():
            calibrate(self.model, self.tuner, self.edit_log, batches, loss)

    def on_train_start(self, total_steps: int) -> None:
        """Tell the tuner the number of optimizer steps, before training and before a resume.

        If the method needs this call, `calibrate`, `on_step_end` or `loss`, and a training loop leaves it out, the loop
        gets an AttachError within its first three steps.

        Raises:
            AttachError: See `parameters`.
        """
        refuse_unfrozen(self.model, self.sites)
        self._loop_check.record("on_train_start")
        call_hook(self.tuner, "on_train_start", total_steps)

    def on_step_end(self, step: int) -> None:
        """Tell the tuner that the optimizer did this step (from 0), while its gradients still exist."""
        self._loop_check.record("on_step_end")
        call_hook(self.tuner, "on_step_end", step)

    def loss(self, step: int) -> Tensor | float:
        """Return the method's own term of the loss at this step (from 0), after the forward; 0.0 if it has none.

        Add it to your loss in every step: `loss = loss + att.loss(step)`. With micro-batches, add it once per step.
        """
        if torch.is_grad_enabled():  # a validation loss trains nothing
            self._loop_check.record("loss")
        term: Tensor | float | None = call_hook(self.tuner, "loss", step)
        return self._aux_losses.take() + (0.0 if term is None else term)

    def aux_loss(self) -> Tensor | float:
        """Return the part of `loss` that adapters set in their forward: with micro-batches, add it to that of each."""
        return self._aux_losses.take(by_micro_batch=True)

    def check_gradients(self, *, under_way: bool = False) -> None:
        """Check after a backward that every tuned and head parameter has a gradient.

        Args:
            under_way: Also check that the gradients of the tuned parameters are not all zero. In the first steps they
                may be, because some adapters start at zero.

        Raises:
            DeadSite: Some have no gradient, or all are zero.
            AttachError: See `parameters`.
        """
        self._check_in_model()
        tuned = gradients.expected(self.tuned, self.model, self.sites, may_lack=self.tuner.may_lack_gradients)
        gradients.check_gradients(self.name, tuned, self.head, self.edit_log.unfrozen, under_way=under_way)

    def state(self) -> dict[str, Tensor]:
        """Return what is saved, by state_dict key: tuned and head tensors, and the buffers that move with them.

        While the attachment is enabled, they are the model's own tensors. While it is disabled, those that it trains in
        place may be copies with the trained values.
        """
        return self.tensors.saved()

    def file_state(self) -> dict[str, Tensor]:
        """Return the tensors of `state` by an adapter file's keys, which do not depend on the attachment's name."""
        state = self.state()
        external = self.tuner.to_external(state)
        return external[1] if external is not None else {self.tensors.file_key(key): t for key, t in state.items()}

    def describe(self) -> dict[str, Any]:
        """Return what the configuration of an adapter says about it: the method, and the backbone it belongs to."""
        return describe(self.method, self.tuner, self.sites, self.tensors, self.state(), self.file_state())

    def fingerprint(self) -> str:
        """Return the SHA-256 of the frozen backbone; see `AdapterTensors.fingerprint`."""
        return self.tensors.fingerprint()

    def reference_logits(self) -> dict[str, Any] | None:
        """Return the logits of a synthetic image with the attachment enabled, as they are saved with it.

        None if another attachment or classifier is in use, the backbone is sharded, or a logit is not finite.
        """
        if self.tensors.is_sharded or not self.tensors.are_alone():
            return None
        with self._toggled(True):
            return reference_logits(self.model, self.sites)

    def save(self, path: str | Path, *, metadata: Mapping[str, Any] | None = None) -> None:
        """Write the adapter directory: `adapter_config.json`, `adapter_model.safetensors` and a model card.

        Args:
            path: The directory; an adapter that is there is replaced.
            metadata: Further plain data for the configuration: class names, preprocessing, results.

        Raises:
            AttachError: It was detached or merged, or the model has other tensors now, see `parameters`.
            UsageError: `path` is a file, or a directory that holds something else; or `metadata` is not plain.
            CheckpointError: It cannot be written.
        """
        self._check_attached()
        self._check_in_model()
        if self.enabled:
            self.tensors.check_left_head(self.name)
        warn_of_changed(self.model, self.sites)
        check_arguments("save", path=(path, PathText), metadata=(metadata, Mapping | None))
        check_plain(metadata or {})
        outputs = recorded_outputs(self.reference_logits(), self.model, self.sites, self.edit_log, self.disabled())
        config = {**self.describe(), "reference_logits": outputs, "metadata": dict(metadata or {})}
        write(path, config, self.counts, self.file_state(), self.tuner.to_external(self.state()))

    def disabled(self) -> AbstractContextManager[None]:
        """Let the model compute what it did before attaching inside the context; see `disable`."""
        return self._toggled(False)

    @contextmanager
    def _toggled(self, on: bool) -> Iterator[None]:
        before = self.enabled
        (self.enable if on else self.disable)()
        try:
            yield
        finally:
            if before != on and self.attached:
                (self.enable if before else self.disable)()

    def enable(self) -> None:
        """Let the attachment take effect again after `disable`, with the values that it trained in place.

        Raises:
            AttachError: See `disable`; or another attachment is in the way, such as one with prompts. Nothing has
                changed.
        """
        self._check_attached()
        if self.enabled:
            return
        for check in self.edit_log.enable_checks:
            check()
        self._set_enabled(True)

    def disable(self) -> None:
        """Let the model compute what it did before attaching until `enable`.

        It does so bit for bit, unless torch picks another kernel: hooks switch off the fast path that torch's
        `nn.TransformerEncoderLayer` takes without gradients, and a frozen weight may be rounded differently.

        Tensors that train in place, such as the classifier's, are exchanged. So do not disable between a forward and
        its backward: to learn from the backbone's own logits, compute them first.

        Raises:
            AttachError: The attachment trains backbone or head, and was made with keep_original=False; or the model
                has other tensors now, see `parameters`. Nothing has changed.
        """
        self._check_attached()
        if self.enabled:
            self._set_enabled(False)

    def detach(self) -> None:
        """Give the model back as it was before attaching: keys, flags and values.

        A tensor that a later attachment trains too keeps its value until that one is detached.

        Raises:
            AttachError: See `disable`.
        """
        self._check_attached()
        self._exchange(False, self._exchangeable())
        self._undo()

    def merge(self) -> None:
        """Fold the adapters into the backbone's weights and remove them; weights that trained in place stay.

        Raises:
            NotMergeable: An adapter is not a change of weights, or changes weights that another attachment trains in
                place. Nothing has changed.
        """
        was_enabled = self.enabled
        self.enable()
        in_place = self.tensors.in_place()
        self._check_in_model(in_place)
        by_hand = self._state.changed_by_hand()
        if self.edit_log.can_fold:
            try:
                fold(self.model, self.sites, self.edit_log, self._state, self.name)
            except BaseException:
                if not was_enabled:
                    self.disable()
                raise
        self._state.values.make_original(self.edit_log.label, in_place)
        self._undo()
        self._state.accept_values(except_for=by_hand)

    def __deepcopy__(self, memo: dict[int, Any]) -> Attachment:
        raise AttachError(
            f"the attachment {self.name} belongs to its own model and cannot be copied. Copy the model, which keeps "
            "its adapters: copy.deepcopy(attachment.model). Or save the attachment, and petune.load it on another model"
        )

    def _undo(self) -> None:
        self.edit_log.undo()
        self.attached = False
        forget_compiled_code()

    def _set_enabled(self, on: bool) -> None:
        in_place = self._exchangeable()
        if not on:
            self._loop_check.pause()
        self.edit_log.set_enabled(on)
        self._exchange(on, in_place)
        self.enabled = on
        if on:
            self._loop_check.resume()

    def _exchangeable(self) -> dict[str, Tensor]:
        """Return the tensors that train in place, if their original values can be given back.

        Raises:
            AttachError: They cannot.
        """
        in_place = self.tensors.in_place()
        if in_place and not self._keep_original:
            raise AttachError(
                f"the values from before {self.name} were not kept, so it cannot be disabled or detached. Attach with "
                "keep_original=True"
            )
        self._check_in_model(in_place)
        return in_place

    def _exchange(self, on: bool, in_place: dict[str, Tensor]) -> None:
        """Give tensors that train in place their trained values, or the values they have without this attachment."""
        self._state.set_enabled(self.edit_log.label, on, in_place)
        if in_place:
            forget_caches(self.model)

    def _check_in_model(self, only: Mapping[str, Tensor] | None = None) -> None:
        if self.attached:
            self.tensors.check_in_model(self.name, active=self.enabled, only=only)

    def _check_trainable(self) -> None:
        self._check_in_model()
        refuse_unfrozen(self.model, self.sites)

    def _check_attached(self) -> None:
        if not self.attached:
            raise AttachError(f"{self.name} was detached or merged. Attach it again first")
