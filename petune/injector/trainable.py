"""Who trains what on a model, and how the model was before the first attachment: one ledger a model.

Attachments may come and go in any order; flags and modes follow from the claims that are left.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from petune.base.errors import AttachError
from petune.sites.site import Sites

ATTRIBUTE = "petune_trainable_state"
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


@dataclass(eq=False)
class Claim:
    """What one attachment holds of the model.

    Attributes:
        parameters: All it trains: tuned and head.
        added: Parameters, and buffers, that were not there before.
        modules: Modules that go to train mode.
        originals: By key, what it trains in place and its value from before; None where that was not kept.
        on: Whether it takes effect.
        kept: By key, what it has trained, while the model has another value.
    """

    parameters: tuple[nn.Parameter, ...] = ()
    added: tuple[Tensor, ...] = ()
    modules: tuple[nn.Module, ...] = ()
    originals: dict[str, tuple[Tensor, Tensor]] | None = None
    on: bool = True
    kept: dict[str, Tensor] = field(default_factory=dict)

    def changes(self, key: str, tensor: Tensor) -> bool:
        """Whether it trains this tensor in place."""
        if self.originals is None:
            return any(p is tensor for p in self.parameters)
        return key in self.originals and self.originals[key][0] is tensor


class TrainableState(nn.Module):
    """Keeps frozen parts frozen and in eval mode: stands in for the model's `train`, and holds no parameter.

    It is a submodule of the model and its bound method is the model's `train` attribute, so copies of the model
    get their own, as with hooks. The model's own `training` flag follows `train(mode)` as ever.

    Attributes:
        sites: Of the model before anything was attached to it.
        claims: By the attachment's name.
        awake: Attentions that were told to call a layer, and the attachments that need it; see `Edit.use_qkv_module`.
    """

    is_petune_holder = True

    def __init__(self, model: nn.Module, sites: Sites) -> None:
        super().__init__()
        self.sites = sites
        self.claims: dict[str, Claim] = {}
        self.awake: dict[nn.Module, set[str]] = {}
        self._train_before = model.__dict__.get("train")
        # in tuples, since a module as an attribute would make the model a child of its own child
        self._model = (model,)
        self._flags = tuple((p, p.requires_grad) for p in model.parameters())
        self._modes = tuple((m, m.training) for m in model.modules())

    @property
    def model(self) -> nn.Module:
        """Whose ledger it is."""
        return self._model[0]

    def forward(self, x: Any) -> Any:
        """A model whose forward calls all of its children calls this one too: it changes nothing."""
        return x

    def open(self, name: str) -> None:
        """Enter an attachment that trains nothing yet.

        Raises:
            AttachError: The name is taken.
        """
        if name in self.claims:
            raise AttachError(
                f"each attachment needs a name of its own, but {name!r} is attached already: detach it, or stack "
                "another beside it with name=…"
            )
        self.claims[name] = Claim()

    def claim(self, name: str, claim: Claim) -> None:
        """Let `name` train what it claims; all that nobody claims is frozen."""
        self.claims[name] = Claim()
        for key, (tensor, value) in (claim.originals or {}).items():
            owner = self._owner(key, tensor)
            if owner is not None:
                owner.kept[key] = value
        self.claims[name] = claim
        self._freeze()

    @torch.no_grad()
    def switch(self, name: str, on: bool, live: Mapping[str, Tensor]) -> None:
        """Let a claim take effect or not; what several train has the value of the last of them that does.

        Args:
            name: Whose.
            on: Whether.
            live: What it changes in place, by key, as the model has it.
        """
        claim = self.claims[name]
        tensors = {key: (claim.originals or {}).get(key, (live[key],))[0] for key in live}
        before = {key: self._owner(key, tensor) for key, tensor in tensors.items()}
        claim.on = on
        for key, tensor in tensors.items():
            was, now = before[key], self._owner(key, tensor)
            if was is now:
                continue
            if was is not None:
                was.kept[key] = live[key].detach().clone()
            value = self._original(key, tensor) if now is None else now.kept.pop(key, None)
            # a buffer of another shape was made anew by the model's own forward (ConViT): it is not ours to put back
            if value is not None and value.shape == live[key].shape:
                live[key].copy_(value)

    def value(self, name: str, key: str, live: Tensor) -> Tensor:
        """What the model has at `key` where `name` takes effect: `live`, unless it is off and none after it is on."""
        claim = self.claims.get(name)
        kept = claim.kept.get(key) if claim is not None else None
        if claim is None or kept is None:
            return live
        tensor = (claim.originals or {}).get(key, (live,))[0]
        later = list(self.claims.values())[list(self.claims).index(name) :]
        return live if any(c.on and c.changes(key, tensor) for c in later) else kept

    def beneath(self, name: str, key: str, live: Tensor) -> Tensor:
        """What the model has at `key` without what attachments made after `name` have trained there in place.

        Raises:
            AttachError: The value was not kept.
        """
        at = list(self.claims).index(name) + 1
        upto, later = list(self.claims.values())[:at], list(self.claims.values())[at:]
        # what an earlier one trains too is saved by it as it is now, see `value`
        if any(c.on and c.changes(key, live) for c in upto) or not any(c.on and c.changes(key, live) for c in later):
            return live
        value = self._original(key, live)
        if value is None:
            raise AttachError(
                f"{name} belongs to the backbone as it was before another attachment trained {key}, but that value was "
                "not kept; attach what trains the backbone's own tensors with keep_original=True"
            )
        return value

    def use_qkv_module(self, module: nn.Module, name: str, on: bool) -> None:
        """Let an attention call its qkv layer as long as one attachment needs it."""
        users = self.awake.setdefault(module, set())
        if on:
            users.add(name)
        else:
            users.discard(name)
        module.qkv_bias_separate = bool(users)  # type: ignore[assignment]

    def bequeath(self, name: str) -> None:
        """Hand the original values of `name` to the attachment made after it that trains the same tensor."""
        later = list(self.claims.values())[list(self.claims).index(name) + 1 :]
        for key, (tensor, value) in (self.claims[name].originals or {}).items():
            heir = next((c for c in later if c.originals is not None and c.changes(key, tensor)), None)
            if heir is not None and heir.originals is not None:
                heir.originals[key] = tensor, value

    def _owner(self, key: str, tensor: Tensor) -> Claim | None:
        """The last claim on a tensor that takes effect."""
        return next((c for c in reversed(self.claims.values()) if c.on and c.changes(key, tensor)), None)

    def _original(self, key: str, tensor: Tensor) -> Tensor | None:
        """What a tensor was before the first claim on it."""
        first = next((c for c in self.claims.values() if c.changes(key, tensor)), None)
        return None if first is None or first.originals is None else first.originals[key][1]

    def close(self, name: str) -> None:
        """Strike out an attachment; with the last one the model is as it was before the first.

        Modes are too, unless `train()` or `eval()` was called since: then every module follows that.
        """
        self.claims.pop(name, None)
        if self.claims:
            self._freeze()
            return
        model = self._model[0]
        delattr(host_for(model), ATTRIBUTE)
        if self._train_before is not None:
            model.train = self._train_before  # type: ignore[method-assign]
        else:
            del model.__dict__["train"]
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
            if not flag:
                parameter.grad = None
        now, before = model.training, self._modes[0][1]
        for module, mode in self._modes:
            module.training = mode if now == before else now

    def set_train(self, mode: bool = True) -> nn.Module:
        """`model.train(mode)`, after which the frozen modules are in eval mode."""
        model = self._model[0]
        if self._train_before is not None:
            self._train_before(mode)
        else:
            type(model).train(model, mode)
        moving = {id(m) for claim in self.claims.values() for m in claim.modules} | {id(model)}
        moving |= {id(m) for h in model.modules() if hasattr(h, "is_petune_holder") for m in h.modules()}
        for module in model.modules():
            if id(module) not in moving:
                module.training = False
        return model

    def _freeze(self) -> None:
        model = self._model[0]
        trained = {id(p) for claim in self.claims.values() for p in claim.parameters}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        self.set_train(model.training)


def open_trainable_state(model: nn.Module, sites: Sites) -> TrainableState:
    """The model's ledger, a new one for a model without."""
    ledger = trainable_state_of(model)
    if ledger is None:
        ledger = TrainableState(model, sites)
        host_for(model).add_module(ATTRIBUTE, ledger)
        model.train = ledger.set_train  # type: ignore[method-assign]
    return ledger


def trainable_state_of(model: nn.Module) -> TrainableState | None:
    """The model's ledger, if something is attached to it."""
    ledger = getattr(host_for(model), ATTRIBUTE, None)
    return ledger if isinstance(ledger, TrainableState) else None


def host_for(module: nn.Module) -> nn.Module:
    """`module`, or the first module inside it to which a child can be added without being called by it.

    Raises:
        AttachError: There is none.
    """
    for candidate in module.modules():
        if not isinstance(candidate, CONTAINERS):
            return candidate
    raise AttachError(f"an adapter needs a module to sit in, but {type(module).__name__} holds none")


def added_to(model: nn.Module) -> set[int]:
    """Identities of all parameters and buffers that attachments have added to the model."""
    ledger = trainable_state_of(model)
    added = {id(p) for claim in ledger.claims.values() for p in claim.added} if ledger else set()
    holders = [m for m in model.modules() if hasattr(m, "is_petune_holder")]
    return added | {id(t) for h in holders for t in (*h.parameters(), *h.buffers())}


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by state_dict key: also where a library has moved a module and hides that in state_dict."""
    keys = _keys(model)
    return {keys.get(id(p), name): p for name, p in model.named_parameters()}


def buffer_places(
    model: nn.Module, modules: Iterable[nn.Module], single: Iterable[tuple[nn.Module, str]]
) -> dict[str, tuple[nn.Module, str]]:
    """By state_dict key, the module and the name there of the buffers in `modules`, and of `single` ones.

    A buffer may be made anew, or be taken out of the model with its module.
    """
    wanted, more = set(modules), set(single)
    found: dict[int, tuple[str, nn.Module, str]] = {}  # several modules may share one
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if module in wanted or (module, name) in more:
                found.setdefault(id(buffer), (f"{path}.{name}" if path else name, module, name))
    keys = _keys(model) if found else {}
    return {keys.get(identity, path): (module, name) for identity, (path, module, name) in found.items()}


def _keys(model: nn.Module) -> dict[int, str]:
    return {id(t): key for key, t in reversed(model.state_dict(keep_vars=True).items())}  # of tied ones the first
