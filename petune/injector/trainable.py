"""The trainable state of a model: which attachment trains what, and what else is frozen.

Attachments may be enabled, disabled and removed in any order. Those that remain
determine what trains, what is in train mode, and which values the model holds.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from petune.base.errors import AttachError
from petune.injector.bank_hold import BankHold
from petune.injector.fixed_parameters import SavedTraining, fixed_parameters
from petune.injector.frozen_values import FrozenValues
from petune.injector.hooks.base import Holder
from petune.injector.hooks.layer_checkpointing import LayerCheckpointing
from petune.injector.hooks.nested_encoder import NestedEncoders
from petune.injector.hooks.reentrant import ReentrantCheck
from petune.injector.hooks.torch_attention import Projections
from petune.injector.keys import TensorOwner, named_parameters
from petune.injector.trained_parts import TrainedParts
from petune.injector.values_in_place import ValuesInPlace
from petune.sites.random_draws import RandomDraws, find_random_draws
from petune.sites.sites import Sites

ATTRIBUTE = "petune_trainable_state"
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


class TrainableState(nn.Module):
    """Keep a model's frozen parts frozen and in eval mode, and store the original values of what trains in place.

    It is a submodule of the model and has no parameters. Its method `set_train` replaces the model's `train`. A deep
    copy of the model therefore has its own state. The model's own `training` flag follows `train(mode)` as usual.

    Attributes:
        sites: The model's sites before anything was attached.
        attachments: By the attachment's name in state_dict keys, in the order of attaching.
        values: The values of what they train in place.
        qkv_users: By attention, the attachments that need it to call its qkv layer.
        projections: By attention of torch's own class, the layers that make q, k and v where adapters are on these.
        fixed: Parameters that the model's author has fixed.
        holders: The adapters that verbs have put in, in the order of attaching.
        bank_hold: The mark of an AdapterBank that holds the model, and exchanges classifiers and values.
        is_bank_loading: True while a bank attaches an adapter; of those that train entries it enables one at a time.
    """

    is_petune_module = True

    def __init__(self, model: nn.Module, sites: Sites, saved: SavedTraining) -> None:
        super().__init__()
        self.sites = sites
        self.attachments: dict[str, TrainedParts] = {}
        self.values = ValuesInPlace(self.attachments)
        self.qkv_users: dict[nn.Module, set[str]] = {}
        self.projections: dict[nn.Module, Projections] = {}
        self.holders: list[Holder] = []
        self.bank_hold: BankHold | None = None
        self.is_bank_loading = False
        self._train_before = model.__dict__.get("train")
        self._model = (model,)  # in a tuple: nn.Module would register a plain attribute as a submodule
        self._flags = tuple((p, p.requires_grad, p.grad is not None) for p in model.parameters())
        self.fixed = fixed_parameters(model, sites, [p for p, trains, _ in self._flags if not trains], saved)
        self._modes = tuple((m, m.training) for m in model.modules())
        self._frozen_values = FrozenValues(model)
        self._active_draws = self._silent_draws = RandomDraws()
        self._reentrant = ReentrantCheck(sites)
        self._layer_hooks = [*LayerCheckpointing(model).hook(), *NestedEncoders(model).hook()]
        self._layer_hooks += self._reentrant.hook(model)

    @property
    def model(self) -> nn.Module:
        """The model whose state this is."""
        return self._model[0]

    @property
    def flags_before(self) -> dict[int, bool]:
        """By the identity of each parameter that was in the model before anything was attached, if it trained then."""
        return {id(p): trains for p, trains, _ in self._flags}

    def forward(self, x: Any) -> Any:
        """Return `x`: a model may call all of its children."""
        return x

    def add(self, name: str) -> None:
        """Add an attachment that trains nothing yet.

        Raises:
            AttachError: The name is taken.
        """
        if name in self.attachments:
            raise AttachError(
                f"{name!r} is attached to this model already. Detach it first, or attach a second one under another "
                "name: name=…"
            )
        self.attachments[name] = TrainedParts()

    def set_parts(self, name: str, parts: TrainedParts, in_place: Mapping[str, Tensor], *, keep_original: bool) -> None:
        """Let an attachment train its parts, and freeze what no attachment trains.

        Args:
            name: The attachment.
            parts: What it trains.
            in_place: The tensors it trains that were in the model before it was attached, by state_dict key.
            keep_original: Keep a copy of their values.
        """
        self.attachments[name] = parts
        self.values.add(name, in_place, keep_original=keep_original)
        self._freeze()

    def set_enabled(self, name: str, on: bool, in_place: Mapping[str, Tensor]) -> None:
        """Enable or disable an attachment: exchange the values that it trains in place, and what is in train mode.

        Args:
            name: The attachment.
            on: True to enable it.
            in_place: By state_dict key, the tensors that it trains in place, as they are in the model now.
        """
        parts = self.attachments[name]
        self.values.set_enabled(name, on, in_place)
        if on:
            for parameter in parts.set_aside:
                parameter.requires_grad_(True)
            parts.set_aside = ()
        if self.model.training:
            self.set_train(True)

    def unfrozen_by_hand(self) -> list[str]:
        """Return the keys of parameters that require a gradient though no attachment trains them.

        They were unfrozen, or came into the model after attaching. Another classifier is not among them: AdapterBank
        puts them in.
        """
        trained = {p for parts in self.attachments.values() for p in parts.with_gradient()}
        known = {id(p) for p, _, _ in self._flags}
        head = self.sites.parts.get("head")
        paths = tuple(f"{path}." for path, _ in head.named_modules) if head is not None else ()
        loose = {key: p for key, p in named_parameters(self.model).items() if p.requires_grad and id(p) not in trained}
        return [key for key, p in loose.items() if id(p) in known or not key.startswith(paths)]

    def changed_by_hand(self) -> list[str]:
        """Return the keys of frozen parameters and buffers that have other values than before anything was attached."""
        return self._frozen_values.changed(self.model, self._changed_by_attachments())

    def accept_values(self, except_for: Collection[str]) -> None:
        """Take the present values as the backbone's own after a merge, but those of the keys `except_for`."""
        if self.attachments:
            self._frozen_values.update(self.model, except_for)

    def use_qkv_module(self, attention: nn.Module, name: str, on: bool) -> None:
        """Let an attention call its qkv layer as long as one attachment needs it."""
        users = self.qkv_users.setdefault(attention, set())
        if on:
            users.add(name)
        else:
            users.discard(name)
        attention.qkv_bias_separate = bool(users)  # type: ignore[assignment]

    def remove(self, name: str) -> None:
        """Remove an attachment; without the last one the model is as it was before the first.

        Train and eval modes are restored too, unless `train()` or `eval()` was called in the meantime: then every
        module has the mode of the model.
        """
        parts = self.attachments.pop(name, TrainedParts())
        self.values.remove(parts, name)
        if self.attachments:
            self._freeze()
            return
        model = self.model
        delattr(host_for(model), ATTRIBUTE)
        for handle in self._layer_hooks:
            handle.remove()
        if model.__dict__.get("train") == self.set_train:  # else someone has put another one around it
            del model.__dict__["train"]
            if self._train_before is not None:
                model.train = self._train_before  # type: ignore[method-assign]
        for parameter, flag, had_gradient in self._flags:
            parameter.requires_grad_(flag)
            if not flag or not had_gradient:
                parameter.grad = None
        now, before = model.training, self._modes[0][1]
        for module, mode in self._modes:
            module.training = mode if now == before else now

    @property
    def drawing(self) -> tuple[nn.Module, ...]:
        """The backbone's modules that `set_backbone_dropout` lets draw random numbers."""
        return self._active_draws.drawing

    def set_backbone_dropout(self, active: bool) -> int:
        """See `Attachment.set_backbone_dropout`."""
        draws = find_random_draws(self.model, self.sites.input_spec)
        own = {m for m, _ in self._modes} - {self.model}
        backbone = RandomDraws(tuple(m for m in draws.drawing if m in own), tuple(m for m in draws.around if m in own))
        self._active_draws = backbone if active else RandomDraws()
        self._silent_draws = RandomDraws() if active else backbone
        if self.model in draws.drawing and not active:
            warnings.warn(
                f"{self.sites.model} draws random numbers in its own forward, which follows model.training: they "
                "stay on. Build the model with a drop rate of 0",
                stacklevel=3,
            )
        self.set_train(self.model.training)
        return len(backbone.drawing) + (self.model in draws.drawing)

    def set_train(self, mode: bool = True) -> nn.Module:
        """Do `model.train(mode)`, then put the frozen modules in eval mode; see `set_backbone_dropout`."""
        model = self.model
        if self._train_before is not None:
            self._train_before(mode)
        else:
            type(model).train(model, mode)
        if not self.attachments:  # all were detached, and someone has kept this method
            return model
        enabled = [parts for parts in self.attachments.values() if parts.enabled]
        moving = {id(m) for parts in enabled for m in parts.modules} | {id(model)}
        moving |= {id(m) for holder in _holders(model) for m in holder.modules()}
        for module in model.modules():
            if id(module) not in moving:
                module.training = False
        for module in (*self._active_draws.drawing, *self._active_draws.around):
            module.training = mode
        for module in self._silent_draws.drawing:
            module.training = False
        return model

    def _changed_by_attachments(self) -> set[int]:
        """Return the identities of all tensors that attachments train, change or added."""
        by_key: dict[str, Tensor] = {**named_parameters(self.model), **dict(self.model.named_buffers())}
        in_place = {key for parts in self.attachments.values() for key in parts.in_place}
        trained = {p for parts in self.attachments.values() for p in parts.with_gradient()}
        return trained | {id(t) for key, t in by_key.items() if key in in_place} | added_to(self.model)

    def _freeze(self) -> None:
        trained = {p for parts in self.attachments.values() if parts.enabled for p in parts.with_gradient()}
        for parts in self.attachments.values():
            own = set() if parts.enabled else parts.with_gradient() - trained
            parts.set_aside = tuple(p for p in self.model.parameters() if id(p) in own)
        for parameter in self.model.parameters():
            if parameter.is_floating_point() or parameter.is_complex():
                parameter.requires_grad_(id(parameter) in trained)
        self._reentrant.looks_inside = True
        self.set_train(self.model.training)


def open_trainable_state(model: nn.Module, sites: Sites, saved: SavedTraining) -> TrainableState:
    """Return the model's trainable state, a new one for a model without."""
    state = trainable_state_of(model)
    if state is None:
        state = TrainableState(model, sites, saved)
        host_for(model).add_module(ATTRIBUTE, state)
        model.train = state.set_train  # type: ignore[method-assign]
    return state


def trainable_state_of(model: nn.Module) -> TrainableState | None:
    """Return the model's trainable state, or None if nothing is attached to it."""
    state = getattr(host_for(model), ATTRIBUTE, None)
    return state if isinstance(state, TrainableState) else None


def check_not_in_bank(model: nn.Module) -> None:
    """Check that no AdapterBank holds the model; take out the adapters of one that was deleted.

    Raises:
        AttachError: One does.
    """
    state = trainable_state_of(model)
    if state is not None and state.bank_hold is not None:
        state.bank_hold.give_way()


def host_for(module: nn.Module) -> nn.Module:
    """Return the first of `module` and its submodules that does not call every child that is added to it.

    Raises:
        AttachError: There is none.
    """
    for candidate in module.modules():
        if not isinstance(candidate, CONTAINERS):
            return candidate
    raise AttachError(f"{type(module).__name__} holds no module that an adapter could be added to")


def added_to(model: nn.Module) -> set[int]:
    """Return the identities of all parameters and buffers that attachments have added to the model."""
    state = trainable_state_of(model)
    added = {id(t) for parts in state.attachments.values() for t in parts.added} if state else set()
    added |= {id(module._buffers.get(name)) for module, name in buffers_added_to(model)} - {id(None)}
    return added | {id(t) for holder in _holders(model) for t in (*holder.parameters(), *holder.buffers())}


def buffers_added_to(model: nn.Module) -> set[TensorOwner]:
    """Return the buffers that attachments have added, each as its module and its name there."""
    state = trainable_state_of(model)
    return {owner for parts in state.attachments.values() for owner in parts.added_buffers} if state else set()


def _holders(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if hasattr(m, "is_petune_module")]
