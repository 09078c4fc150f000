"""`attach`: run a tuner on a model, freeze the rest, prove that the edit is alive, or leave the model as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from petune.anatomy import find_sites
from petune.anatomy.forward import forget_caches
from petune.edit import Edit
from petune.errors import AlreadyCompiled, AttachError, DeadSite, NotMergeable
from petune.hooks import Holder, Modes
from petune.registry import build_tuner
from petune.sites import Sites
from petune.tuner import Tuner, TunerConfig


@dataclass(frozen=True)
class Counts:
    """How many parameters there are.

    Attributes:
        tuned: The tuner's: added ones, and the backbone's own that it unfroze.
        head: The classifier's, where it trains.
        total: All of the model as attached.
        backbone: All without classifier and without what the tuner added.
        classifier: The classifier's, trained or not.
    """

    tuned: int
    head: int
    total: int
    backbone: int
    classifier: int

    @property
    def trainable(self) -> int:
        """Tuned and head."""
        return self.tuned + self.head

    @property
    def percent_of_total(self) -> float:
        """Trainable over all of the model, adapters included."""
        return 100 * self.trainable / self.total

    @property
    def percent_of_backbone(self) -> float:
        """Trainable over backbone and classifier: what full fine-tuning would train. Papers mostly print this."""
        return 100 * self.trainable / (self.backbone + self.classifier)

    def __str__(self) -> str:
        return (
            f"tuned {self.tuned:,} + head {self.head:,} = {self.trainable:,} trainable of {self.total:,} "
            f"({self.percent_of_total:.3f} % of all, {self.percent_of_backbone:.3f} % of backbone and head)"
        )


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
    _refuse_compiled(model)
    tuner = build_tuner(method, **options)
    name = name or (method if isinstance(method, str) else type(tuner).__name__.lower())
    label = "".join(c if c.isalnum() or c == "_" else "_" for c in name)
    if any(getattr(m, f"petune_modes_{label}", None) is not None for m in (model,)):
        raise AttachError(f"each attachment needs a name of its own, but {name!r} is attached already; pass name=...")
    sites = sites or find_sites(model, input_size)
    edit = Edit(model, sites, label)
    flags = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(m, m.training) for m in model.modules()]
    edit.on_detach(lambda: _restore_flags(flags, modes))
    try:
        tuner.attach(edit)
        attachment = Attachment(model, tuner, name, edit, train_head, keep_original)
        _check_live(edit)
    except BaseException:
        edit.undo()
        raise
    return attachment


class Attachment:
    """A tuner on a model.

    Attributes:
        model, tuner, name: What was attached to what, and as what.
        sites: The model's places.
        tuned, head: Trainable parameters by state_dict key.
        counts: How many.
    """

    def __init__(
        self, model: nn.Module, tuner: Tuner[Any], name: str, edit: Edit, train_head: bool, keep_original: bool
    ) -> None:
        self.model, self.tuner, self.name, self.sites = model, tuner, name, edit.sites
        self._edit, self._train_head, self.attached = edit, train_head, True
        head = edit.sites.need_head() if train_head else edit.sites.head
        self._head_modules = tuple(head.modules) if head is not None else ()
        classifier = {id(p) for m in self._head_modules for p in m.parameters()}
        added = {id(p) for holder, _ in edit.holders for p in holder.parameters()}
        tuned = added | {id(p) for p in edit.trained} - classifier
        named = dict(model.named_parameters())
        self.tuned = {key: p for key, p in named.items() if id(p) in tuned}
        self.head = {key: p for key, p in named.items() if id(p) in classifier} if train_head else {}
        self.counts = _counts(named, self.tuned, self.head, added, classifier)
        self._originals = {k: t.detach().clone() for k, t in self._changing().items()} if keep_original else None
        self._freeze(named)

    def parameters(self) -> list[nn.Parameter]:
        """What an optimizer takes: tuned and head."""
        return [*self.tuned.values(), *self.head.values()]

    def train(self, mode: bool = True) -> nn.Module:
        """`model.train(mode)`; what is frozen stays in eval mode either way."""
        return self.model.train(mode)

    def extra_loss(self, step: int) -> Tensor | float:
        """The tuner's own term of the loss at this step, 0.0 where it has none."""
        term = self.tuner.loss(step)
        return 0.0 if term is None else term

    def check_gradients(self) -> None:
        """After the first backward: every tuned and head parameter has a gradient.

        Raises:
            DeadSite: Some have none; they are named.
        """
        dead = [key for key, p in {**self.tuned, **self.head}.items() if p.grad is None]
        if dead:
            raise DeadSite(
                f"every parameter of {self.name} must get a gradient, but {len(dead)} got none, as "
                f"{', '.join(dead[:3])}: {self.sites.model} does not use "
                "them in its output. Use another method on this model"
            )

    def state(self) -> dict[str, Tensor]:
        """What is saved: tuned and head tensors, and the buffers that move with them, by state_dict key."""
        moving = {id(b) for m in self._moving_modules() for b in m.buffers()}
        buffers = {k: b for k, b in self.model.named_buffers() if id(b) in moving}
        return {**self.tuned, **self.head, **buffers}

    def save(self, path: str | Path, *, metadata: Mapping[str, Any] | None = None) -> None:
        """Write the adapter directory; see `petune.state.save`."""
        from petune.state import save

        save(self, Path(path), metadata)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model computes what it did before attaching, bit for bit.

        Raises:
            AttachError: The attachment trains backbone or head, and was made with keep_original=False.
        """
        self._need_attached()
        now = {key: t.detach().clone() for key, t in self._changing().items()}
        self._put_back()
        self._switch(False)
        try:
            yield
        finally:
            self._switch(True)
            _copy(self._changing(), now)
            forget_caches(self.model)

    def detach(self) -> None:
        """Give the model back as it was before attaching: keys, flags and values.

        Raises:
            AttachError: See `disabled`.
        """
        self._need_attached()
        self._put_back()
        self._edit.undo()
        self.attached = False

    def merge(self) -> None:
        """Fold the adapters into the backbone's weights and remove them; trained weights stay as they are.

        Raises:
            NotMergeable: An adapter is no change of weights; the reason is named and nothing was changed.
        """
        self._need_attached()
        for holder, passed in self._edit.holders:
            if not callable(getattr(holder.adapter, "merge", None)):
                why = getattr(holder.adapter, "why_not_mergeable", "its adapter defines no merge(module)")
                raise NotMergeable(f"{self.name} cannot be folded into the weights of {passed[-1].where}: {why}")
        for holder, passed in self._edit.holders:
            holder.adapter.merge(passed[-1].exit)  # type: ignore[operator]
        self._edit.undo()
        self.attached = False

    def _freeze(self, named: Mapping[str, nn.Parameter]) -> None:
        trainable = {id(p) for p in self.parameters()}
        foreign = {id(p) for m in self.model.modules() if hasattr(m, "is_petune_holder") for p in m.parameters()}
        for parameter in named.values():
            if id(parameter) in trainable:
                parameter.requires_grad_(True)
            elif id(parameter) not in foreign:  # another attachment's
                parameter.requires_grad_(False)
        kept = {id(m) for m in self._moving_modules()} | {id(self.model)}
        kept |= {id(m) for h in self.model.modules() if hasattr(h, "is_petune_holder") for m in h.modules()}
        modes = Modes(self.name, self.model, [m for m in self.model.modules() if id(m) not in kept])
        attribute = f"petune_modes_{self._edit.name}"
        self.model.add_module(attribute, modes)
        self.model.train = modes.set_train  # type: ignore[method-assign]
        self._edit.on_detach(lambda: _remove_modes(self.model, attribute, modes))
        self.model.train(self.model.training)

    def _moving_modules(self) -> list[nn.Module]:
        """Modules that go to train mode: unfrozen ones, and the head's."""
        roots = [*self._edit.train_modules, *(self._head_modules if self._train_head else ())]
        return [m for root in roots for m in root.modules()]

    def _changing(self) -> dict[str, Tensor]:
        """Tensors that were there before attaching and that training may change."""
        added = {id(t) for h, _ in self._edit.holders for t in (*h.parameters(), *h.buffers())}
        return {key: t for key, t in self.state().items() if id(t) not in added}

    def _put_back(self) -> None:
        changing = self._changing()
        if self._originals is None:
            if changing:
                raise AttachError(
                    f"giving back the model needs the values from before {self.name}, which were not kept; "
                    "attach with keep_original=True"
                )
            return
        _copy(changing, self._originals)
        forget_caches(self.model)

    def _switch(self, on: bool) -> None:
        for holder, _ in self._edit.holders:
            holder.forget()
            holder.enabled = on
        for switch in self._edit.switches if on else reversed(self._edit.switches):
            switch(on)

    def _need_attached(self) -> None:
        if not self.attached:
            raise AttachError(f"{self.name} must be attached for this, but was detached or merged before")


def _counts(
    named: Mapping[str, nn.Parameter],
    tuned: Mapping[str, nn.Parameter],
    head: Mapping[str, nn.Parameter],
    added: set[int],
    classifier: set[int],
) -> Counts:
    def count(parameters: Any) -> int:
        return sum(p.numel() for p in parameters)

    old = [p for p in named.values() if id(p) not in added]
    return Counts(
        tuned=count(tuned.values()),
        head=count(head.values()),
        total=count(named.values()),
        backbone=count(p for p in old if id(p) not in classifier),
        classifier=count(p for p in old if id(p) in classifier),
    )


def _refuse_compiled(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise AlreadyCompiled(
                f"a tuner must be attached before compiling, but {path or 'the model'} is compiled and would not see "
                "it. Attach to the model first, then torch.compile it"
            )


def _check_live(edit: Edit) -> None:
    """One forward without gradient: every adapter must have been called."""
    called: set[int] = set()

    def watch(holder: Holder) -> RemovableHandle:
        return holder.adapter.register_forward_hook(lambda *_: called.add(id(holder)))

    handles = [watch(holder) for holder, _ in edit.holders]
    model = edit.model
    modes = [(m, m.training) for m in model.modules()]
    like = next(p for p in model.parameters() if p.is_floating_point())
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad():
            model(torch.zeros(1, *edit.sites.input_size, device=like.device, dtype=like.dtype))
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    for holder, passed in edit.holders:
        if id(holder) not in called:
            where = " or ".join(dict.fromkeys(site.where for site in passed))
            raise DeadSite(
                f"{edit.name} would do nothing: the forward of {edit.sites.model} never calls {where} (its weights may "
                "be read without calling it). Use another method on this model"
            )


def _remove_modes(model: nn.Module, attribute: str, modes: Modes) -> None:
    delattr(model, attribute)
    if modes.before is not None:
        model.train = modes.before  # type: ignore[method-assign]
    else:
        del model.__dict__["train"]


def _restore_flags(flags: list[tuple[nn.Parameter, bool]], modes: list[tuple[nn.Module, bool]]) -> None:
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
        if not flag:
            parameter.grad = None
    for module, mode in modes:
        module.training = mode


def _copy(targets: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for key, target in targets.items():
            target.copy_(sources[key])
