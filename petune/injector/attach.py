"""`attach`: run a tuner on a model, freeze the rest, prove that the edit is alive, or leave the model as it was."""

from __future__ import annotations

import copy
import warnings
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from petune.base.arguments import check_arguments
from petune.base.errors import AlreadyCompiled, AttachError, DeadSite
from petune.injector.attachment import Attachment
from petune.injector.edit import Edit, forget_forwards
from petune.injector.edit_log import EditLog
from petune.injector.registry import build_tuner, parse_method, plugin_errors
from petune.injector.trainable import TrainableState, open_trainable_state, trainable_state_of
from petune.injector.tuner import Tuner, TunerConfig
from petune.sites.find import find_sites
from petune.sites.logits import refuse_random
from petune.sites.recorder import record_calls
from petune.sites.site import Sites

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
        method: A registered name (options can be part of it: `vpt:deep=false`), a Tuner, or its config.
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
    name = name or (parse_method(method)[0] if isinstance(method, str) else _default_name(tuner))
    label = label_of(name)
    before = trainable_state_of(model)
    _refuse_parts(model, before)
    sites = sites or (before.sites if before else find_sites(model, input_size))
    _refuse_others_sites(model, sites)
    if before is None:
        refuse_random(model, sites)
        _tell_beside_head(sites, train_head)
    ledger = open_trainable_state(model, sites)
    ledger.open(label)
    log = EditLog(label, undo_steps=[lambda: ledger.close(label)])
    edit = Edit(model, sites, log)
    try:
        with plugin_errors(tuner.method, type(tuner), "was attached"):
            tuner.attach(edit)
        attachment = Attachment(model, sites, tuner, name, log, train_head, keep_original)
        _refuse_idle(attachment)
        _check_live(model, sites, tuner, log)
        forget_forwards(edit)
    except BaseException:
        log.undo()
        raise
    return attachment


def _default_name(tuner: Tuner[Any]) -> str:
    return tuner.method or type(tuner).__name__.lower()


def label_of(name: str) -> str:
    """An attachment's name as a part of state_dict keys."""
    return "".join(c if c.isalnum() or c == "_" else "_" for c in name)


def _refuse_compiled(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise AlreadyCompiled(
                f"a tuner must be attached before compiling, but {path or 'the model'} is compiled and would not see "
                "it. Attach to the model first, then torch.compile it"
            )


def _refuse_parts(model: nn.Module, ledger: TrainableState | None) -> None:
    """One model has one ledger: two would freeze each other's parameters."""
    ledgers = {path.rpartition(".")[0]: m for path, m in model.named_modules() if isinstance(m, TrainableState)}
    others = [path or "the whole that it is a part of" for path, m in ledgers.items() if m.model is not model]
    shared = ledger is None and any(hasattr(m, "is_petune_holder") for m in model.modules())
    if others or shared:
        raise AttachError(
            "all that is attached to a model must be attached to the same module, but something is already, to "
            f"{others[0] if others else 'another model that shares a part of it'}. Attach to that one, or detach first"
        )


def _tell_beside_head(sites: Sites, train_head: bool) -> None:
    if train_head and "head" in sites.parts and sites.beside_head:
        warnings.warn(
            f"the classifier of {sites.model} is {sites.head.where}. Further layers on its features count as backbone, "
            f"and stay as they are unless the method trains them: {', '.join(sites.beside_head)}. If they are new, "
            'name what holds them and the classifier, in petune.load too: sites=petune.find_sites(model, head="…")',
            stacklevel=3,
        )


def _refuse_others_sites(model: nn.Module, sites: Sites) -> None:
    own = {id(m) for m in model.modules()}
    places = [*sites.blocks, *sites.parts.values()]
    strange = [site.where for site in places if any(id(m) not in own for m in site.modules)]
    if strange:
        raise AttachError(
            f"sites must be of the model that is attached to, but {', '.join(strange[:3])} is another module than the "
            f"model's: it is a copy, or was replaced (reset_classifier) after find_sites or while something was "
            "attached. Detach what is attached, then attach without sites, or with find_sites(this model)"
        )


def _refuse_idle(attachment: Attachment) -> None:
    """A method that finds nothing to train must not pass for a linear probe; one that wants none says so by `count`."""
    if attachment.tuned or attachment.tuner.num_parameters(attachment.sites) == 0:
        return
    raise AttachError(
        f"{attachment.name} must find something to train, but {attachment.sites.model} has nothing for it: there would "
        "be a linear probe under another name. Use another method, or linear if only the classifier shall train"
    )


def _check_live(model: nn.Module, sites: Sites, tuner: Tuner[Any], log: EditLog) -> None:
    """One forward without gradient: every adapter must have been called.

    The same method with the same options at the same modules of the same model needs no second proof.
    """
    places = [(type(h), *((id(site.enter), id(site.exit)) for site in passed)) for h, passed in log.placed]
    proof = (type(tuner), tuner.config.model_dump_json(), sites.input_size, *places)
    if proof in _PROVEN.get(model, ()):
        return
    called = record_calls(model, sites.input_size, [holder.adapter for holder, _ in log.placed])
    for holder, passed in log.placed:
        if holder.adapter not in called:
            where = " or ".join(dict.fromkeys(site.where for site in passed))
            raise DeadSite(
                f"{log.name} would do nothing: the forward of {sites.model} never calls {where} (its weights may "
                "be read without calling it). Use another method on this model"
            )
    _PROVEN.setdefault(model, set()).add(proof)
