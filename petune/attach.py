"""`attach`: run a tuner on a model, freeze the rest, prove that the edit is alive, or leave the model as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from petune.anatomy import find_sites
from petune.anatomy.forward import forget_caches
from petune.arguments import PathText, check_arguments
from petune.counts import count_parameters
from petune.edit import Edit
from petune.errors import AlreadyCompiled, AttachError, DeadSite, NotMergeable
from petune.ledger import Claim, added_to, ledger_of, named_parameters, open_ledger
from petune.probe import look, probe, refuse_random
from petune.registry import build_tuner
from petune.sites import Sites
from petune.tuner import Tuner, TunerConfig

_PROVEN: WeakKeyDictionary[nn.Module, set[Any]] = WeakKeyDictionary()


def attach(
    model: nn.Module,
    method: str | Tuner[Any] | TunerConfig,
    *,
    sites: Sites | None = None,
    name: str | None = None,
    train_head: bool = True,
    keep_original: bool = True,
    input_size: tuple[int, int, int] | None = None,
    **options: Any,
) -> Attachment:
    """Attach a tuner to a model, in place.

    Args:
        model: Any image classifier; not compiled yet.
        method: A registered name with `options`, or a Tuner, or its config.
        sites: From `find_sites`; found now if None.
        name: Distinguishes attachments on one model; the method's name by default.
        train_head: Whether the classifier trains too.
        keep_original: Keep a copy of the values that will train (head, unfrozen backbone), so that `disabled` and
            `detach` give the model back to the bit. False saves a copy of the model for `full`.
        input_size: (channels, height, width) for a model that does not tell.

    Raises:
        AlreadyCompiled, SiteNotFound, DeadSite, AttachError: The model is then as it was.
        UnknownName, PluginError, ConfigError: The method cannot be built.
    """
    if not isinstance(model, nn.Module):
        raise AttachError(f"attach needs a model, an nn.Module, but was given {type(model).__name__}")
    flags = {"train_head": (train_head, bool), "keep_original": (keep_original, bool)}
    check_arguments("petune.attach", sites=(sites, Sites | None), name=(name, str | None), **flags)
    _refuse_compiled(model)
    if next(model.parameters(), None) is None:
        raise AttachError(f"a method is attached to a model with weights, but {type(model).__name__} has no parameter")
    tuner = copy.copy(build_tuner(method, **options))  # what it keeps of this model is not another attachment's
    name = name or (method if isinstance(method, str) else type(tuner).__name__.lower())
    label = label_of(name)
    before = ledger_of(model)
    sites = sites or (before.sites if before else find_sites(model, input_size))
    _refuse_others_sites(model, sites)
    if before is None:
        refuse_random(model, sites)
    ledger = open_ledger(model, sites)
    ledger.open(label)
    edit = Edit(model, sites, label)
    edit.on_detach(lambda: ledger.close(label))
    try:
        tuner.attach(edit)
        attachment = Attachment(model, tuner, name, edit, train_head, keep_original)
        _refuse_idle(attachment)
        _check_live(edit, tuner)
        edit.settle()
    except BaseException:
        edit.undo()
        raise
    return attachment


def label_of(name: str) -> str:
    """An attachment's name as a part of state_dict keys."""
    return "".join(c if c.isalnum() or c == "_" else "_" for c in name)


class Attachment:
    """A tuner on a model.

    Attributes:
        model, tuner, name: What was attached to what, and as what.
        sites: The model's places.
        tuned, head: Trainable parameters by state_dict key.
        counts: How many.
        edit: What was done to the model.
        fingerprint: Of the frozen tensors, where they cannot be read any more; None is worked out when saving.
        attached, enabled: Whether it still is, and whether it takes effect now.
    """

    def __init__(
        self, model: nn.Module, tuner: Tuner[Any], name: str, edit: Edit, train_head: bool, keep_original: bool
    ) -> None:
        self.model, self.tuner, self.name, self.sites = model, tuner, name, edit.sites
        self.edit, self._train_head, self.attached, self.enabled = edit, train_head, True, True
        self.fingerprint: str | None = None
        head = edit.sites.need_head() if train_head else edit.sites.head
        self._head_modules = tuple(head.modules) if head is not None else ()
        classifier = {id(p) for m in self._head_modules for p in m.parameters()}
        added = {id(p) for p in edit.added_parameters()}
        tuned = added | {id(p) for p in edit.trained} - classifier
        named = named_parameters(model)
        self.tuned = {key: p for key, p in named.items() if id(p) in tuned}
        self.head = {key: p for key, p in named.items() if id(p) in classifier} if train_head else {}
        self.counts = count_parameters(named, self.tuned, self.head, added | added_to(model), classifier)
        changing = self._changing() if keep_original else {}
        self._originals = {k: (t, t.detach().clone()) for k, t in changing.items()} if keep_original else None
        ledger = open_ledger(model, self.sites)
        moving = tuple(self._moving_modules())
        claim = Claim((*self.tuned.values(), *self.head.values()), tuple(edit.added_tensors()), moving, self._originals)
        ledger.claim(edit.name, claim)

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

    def begin(self, total_steps: int) -> None:
        """Tell the tuner how many steps the training has, before the first and before a resume."""
        self.tuner.begin(total_steps)

    def stepped(self, step: int) -> None:
        """Tell the tuner that the optimizer has done this step (from 0), while the gradients are still there."""
        self.tuner.stepped(step)

    def extra_loss(self, step: int) -> Tensor | float:
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
        own = {key for key, p in self.tuned.items() if any(p is q for q in self.edit.trained)}
        return sorted(silent - own if own - silent else silent)

    def state(self) -> dict[str, Tensor]:
        """What is saved: tuned and head tensors, and the buffers that move with them, by state_dict key.

        They are the model's own tensors; while the attachment is off, of what it trains in place those kept aside.
        """
        ledger = ledger_of(self.model)
        live = self.live_state()
        return live if ledger is None else {key: ledger.value(self.edit.name, key, t) for key, t in live.items()}

    def live_state(self) -> dict[str, Tensor]:
        """The tensors of `state` as they are in the model now, also while the attachment is off."""
        moving = {id(b) for m in self._moving_modules() for b in m.buffers()}
        buffers = {k: b for k, b in self.model.named_buffers() if id(b) in moving}
        return {**self.tuned, **self.head, **buffers}

    def save(self, path: str | Path, *, metadata: Mapping[str, Any] | None = None) -> None:
        """Write the adapter directory; see `petune.state.save`.

        Raises:
            AttachError: Detached or merged, or see `parameters`: what was trained is not there any more.
        """
        from petune.state import save

        self._need_attached()
        self._need_own()
        check_arguments("save", path=(path, PathText), metadata=(metadata, Mapping | None))
        save(self, Path(path), metadata)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model computes what it did before attaching, bit for bit.

        Raises:
            AttachError: The attachment trains backbone or head, and was made with keep_original=False.
        """
        was = self.enabled
        self.switch(False)
        try:
            yield
        finally:
            self.switch(was)

    def switch(self, on: bool) -> None:
        """Disable the attachment, or enable it again; what it trains in place is exchanged too.

        Raises:
            AttachError: See `disabled`.
        """
        self._need_attached()
        check_arguments("switch", on=(on, bool))
        if on == self.enabled:
            return
        if on:
            self._switch(True)
            self._exchange(True)
        else:
            self._exchange(False)
            self._switch(False)
        self.enabled = on

    def detach(self) -> None:
        """Give the model back as it was before attaching: keys, flags and values.

        What a later attachment trains too keeps its value, and goes back to ours when that one is detached.

        Raises:
            AttachError: See `disabled`.
        """
        self._need_attached()
        self._exchange(False)
        open_ledger(self.model, self.sites).bequeath(self.edit.name)
        self.edit.undo()
        self.attached = False

    def merge(self) -> None:
        """Fold the adapters into the backbone's weights and remove them; trained weights stay as they are.

        Raises:
            NotMergeable: An adapter is no change of weights; the reason is named and nothing was changed.
        """
        self.switch(True)
        if self.edit.folds:
            self._fold()
        self.edit.undo()
        self.attached = False

    def _fold(self) -> None:
        """Fold, and compare what the model makes of a picture before and after; put everything back if they differ."""
        before = {key: t.detach().clone() for key, t in self.model.state_dict().items() if isinstance(t, Tensor)}
        expected = look(self.model, self.sites)
        switched = False
        try:
            self.edit.merge(self.name)
            self._switch(False)
            switched = True
            change = float((look(self.model, self.sites) - expected).abs().max() / expected.abs().max().clamp(min=1))
            if not change < (1e-3 if expected.dtype == torch.float32 else 5e-2):
                raise NotMergeable(
                    f"{self.name} must compute the same when folded, but its output moves by {change:.2g}"
                )
        except BaseException:
            self.model.load_state_dict(before, strict=False)
            if switched:  # twice on would pad twice
                self._switch(True)
            raise

    def _moving_modules(self) -> list[nn.Module]:
        """Modules that go to train mode: unfrozen ones, and the head's."""
        roots = [
            *self.edit.train_modules,
            *self.edit.adopted_modules,
            *(self._head_modules if self._train_head else ()),
        ]
        own = {id(m) for holder, _ in self.edit.holders for m in holder.modules()}
        added = {id(m) for h in self.model.modules() if hasattr(h, "is_petune_holder") for m in h.modules()}
        return [m for root in roots for m in root.modules() if id(m) in own or id(m) not in added]

    def _changing(self) -> dict[str, Tensor]:
        """Tensors that were there before attaching and that training may change."""
        added = {id(t) for t in self.edit.added_tensors()}
        return {key: t for key, t in self.live_state().items() if id(t) not in added}

    def _exchange(self, on: bool) -> None:
        """Put in what was trained in place, or what the model has without it."""
        changing = self._changing()
        if changing and self._originals is None:
            raise AttachError(
                f"giving back the model needs the values from before {self.name}, which were not kept; "
                "attach with keep_original=True"
            )
        open_ledger(self.model, self.sites).switch(self.edit.name, on, changing)
        if changing:
            forget_caches(self.model)

    def __deepcopy__(self, memo: dict[int, Any]) -> Attachment:
        raise AttachError(
            f"an attachment belongs to its own model, but {self.name} was to be copied. Copy the model, "
            "copy.deepcopy(attachment.model), which keeps its adapters; or save it, and petune.load it on another"
        )

    def _switch(self, on: bool) -> None:
        for holder, _ in self.edit.holders:
            holder.forget()
            holder.enabled = on
        for switch in self.edit.switches if on else reversed(self.edit.switches):
            switch(on)

    def _need_own(self) -> None:
        """See that what trains is still the model's: it is remembered by identity."""
        here = {id(p) for p in self.model.parameters()}
        modules = {id(m) for m in self.model.modules()}
        of_head = {id(p) for m in self._head_modules for p in m.parameters()}
        in_use = not self.enabled or all(id(m) in modules for m in self._head_modules)  # a task's, while it is not
        lost = [key for key, p in self.tuned.items() if self.attached and id(p) not in here]
        lost += [key for key, p in self.head.items() if id(p) not in of_head or (self.attached and not in_use)]
        if lost:
            raise AttachError(
                f"{self.name} trains the tensors that were there when it was attached, but the model has others for "
                f"{len(lost)} of them, as {', '.join(lost[:3])}: load_state_dict(…, assign=True) or a new classifier "
                "took their places. Change the model first and attach then; load values without assign=True"
            )

    def _need_attached(self) -> None:
        if not self.attached:
            raise AttachError(f"{self.name} must be attached for this, but was detached or merged before")


def _refuse_compiled(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise AlreadyCompiled(
                f"a tuner must be attached before compiling, but {path or 'the model'} is compiled and would not see "
                "it. Attach to the model first, then torch.compile it"
            )


def _refuse_others_sites(model: nn.Module, sites: Sites) -> None:
    own = {id(m) for m in model.modules()}
    places = [site for site in (*sites.blocks, sites.norm, sites.head) if site is not None]
    strange = [site.where for site in places if any(id(m) not in own for m in site.modules)]
    if strange:
        raise AttachError(
            f"sites must be of the model that is attached to, but {', '.join(strange[:3])} is another module than the "
            f"model's: it is a copy, or was replaced (reset_classifier) after find_sites or while something was "
            "attached. Detach what is attached, then attach without sites, or with find_sites(this model)"
        )


def _refuse_idle(attachment: Attachment) -> None:
    """A method that finds nothing to train must not pass for a linear probe; one that wants none says so by `count`."""
    if attachment.tuned or attachment.tuner.count(attachment.sites) == 0:
        return
    raise AttachError(
        f"{attachment.name} must find something to train, but {attachment.sites.model} has nothing for it: there would "
        "be a linear probe under another name. Use another method, or linear if only the classifier shall train"
    )


def _check_live(edit: Edit, tuner: Tuner[Any]) -> None:
    """One forward without gradient: every adapter must have been called.

    The same method with the same options at the same modules of the same model needs no second proof.
    """
    places = [(type(h), *((id(site.enter), id(site.exit)) for site in passed)) for h, passed in edit.holders]
    proof = (type(tuner), tuner.config.model_dump_json(), edit.sites.input_size, *places)
    if proof in _PROVEN.get(edit.model, ()):
        return
    called = probe(edit.model, edit.sites, [holder.adapter for holder, _ in edit.holders])
    for holder, passed in edit.holders:
        if id(holder.adapter) not in called:
            where = " or ".join(dict.fromkeys(site.where for site in passed))
            raise DeadSite(
                f"{edit.name} would do nothing: the forward of {edit.sites.model} never calls {where} (its weights may "
                "be read without calling it). Use another method on this model"
            )
    _PROVEN.setdefault(edit.model, set()).add(proof)
