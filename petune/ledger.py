"""Who trains what on a model, and how the model was before the first attachment: one ledger a model.

Attachments may come and go in any order; flags and modes follow from the claims that are left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from petune.errors import AttachError
from petune.sites import Sites

ATTRIBUTE = "petune_ledger"
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


@dataclass(frozen=True)
class Claim:
    """What one attachment holds of the model.

    Attributes:
        parameters: All it trains: tuned and head.
        added: Parameters, and buffers, that were not there before.
        modules: Modules that go to train mode.
        originals: By key, what it trains in place and its value from before; None where that was not kept.
    """

    parameters: tuple[nn.Parameter, ...] = ()
    added: tuple[Tensor, ...] = ()
    modules: tuple[nn.Module, ...] = ()
    originals: dict[str, tuple[Tensor, Tensor]] | None = None


class Ledger(nn.Module):
    """Keeps frozen parts frozen and in eval mode: stands in for the model's `train`, and holds no parameter.

    It is a submodule of the model and its bound method is the model's `train` attribute, so copies of the model
    get their own, as with hooks. The model's own `training` flag follows `train(mode)` as ever.

    Attributes:
        sites: Of the model before anything was attached to it.
        claims: By the attachment's name.
    """

    is_petune_holder = True

    def __init__(self, model: nn.Module, sites: Sites) -> None:
        super().__init__()
        self.sites = sites
        self.claims: dict[str, Claim] = {}
        self._train_before = model.__dict__.get("train")
        # in tuples, since a module as an attribute would make the model a child of its own child
        self._model = (model,)
        self._flags = tuple((p, p.requires_grad) for p in model.parameters())
        self._modes = tuple((m, m.training) for m in model.modules())

    def forward(self, x: Any) -> Any:
        """A model whose forward calls all of its children calls this one too: it changes nothing."""
        return x

    def open(self, name: str) -> None:
        """Enter an attachment that trains nothing yet.

        Raises:
            AttachError: The name is taken.
        """
        if name in self.claims:
            raise AttachError(f"each attachment needs a name of its own, but {name!r} is attached already; pass name=…")
        self.claims[name] = Claim()

    def claim(self, name: str, claim: Claim) -> None:
        """Let `name` train what it claims; all that nobody claims is frozen."""
        self.claims[name] = claim
        self._freeze()

    def bequeath(self, name: str) -> set[str]:
        """Hand the original values of `name` to the attachments made after it that train the same tensors.

        Returns:
            The keys that another attachment now answers for.
        """
        names = list(self.claims)
        mine = self.claims[name].originals or {}
        inherited: set[str] = set()
        for later in names[names.index(name) + 1 :]:
            theirs = self.claims[later].originals or {}
            for key in (mine.keys() & theirs.keys()) - inherited:
                if theirs[key][0] is mine[key][0]:
                    theirs[key] = mine[key]
                    inherited.add(key)
        return inherited

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


def open_ledger(model: nn.Module, sites: Sites) -> Ledger:
    """The model's ledger, a new one for a model without."""
    ledger = ledger_of(model)
    if ledger is None:
        ledger = Ledger(model, sites)
        host_for(model).add_module(ATTRIBUTE, ledger)
        model.train = ledger.set_train  # type: ignore[method-assign]
    return ledger


def ledger_of(model: nn.Module) -> Ledger | None:
    """The model's ledger, if something is attached to it."""
    ledger = getattr(host_for(model), ATTRIBUTE, None)
    return ledger if isinstance(ledger, Ledger) else None


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
    ledger = ledger_of(model)
    added = {id(p) for claim in ledger.claims.values() for p in claim.added} if ledger else set()
    holders = [m for m in model.modules() if hasattr(m, "is_petune_holder")]
    return added | {id(t) for h in holders for t in (*h.parameters(), *h.buffers())}


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by state_dict key: also where a library has moved a module and hides that in state_dict."""
    keys = {id(t): key for key, t in reversed(model.state_dict(keep_vars=True).items())}  # of tied ones the first
    return {keys.get(id(p), name): p for name, p in model.named_parameters()}
