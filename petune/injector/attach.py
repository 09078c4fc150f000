"""`attach`: put a tuner on a model and freeze the rest. If this fails, the model is unchanged."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from petune.adapters.fingerprint import plain_parts
from petune.base.arguments import check_arguments
from petune.base.errors import AlreadyCompiled, AttachError, DeadSite, UsageError
from petune.base.plugins import plugin_errors
from petune.base.text import plural
from petune.injector.advice import advise, warn_of_layers_before_head
from petune.injector.attachment import Attachment
from petune.injector.calibrating import add_calibration_state
from petune.injector.chosen_blocks import check_follows_blocks, missing_sites_named
from petune.injector.compiled import forget_compiled_code
from petune.injector.creation import ordinary_tensors
from petune.injector.dead_sites import check_used
from petune.injector.edit import Edit, forget_forwards
from petune.injector.edit_log import EditLog
from petune.injector.fixed_parameters import SavedTraining
from petune.injector.hooks.base import described
from petune.injector.keys import label_of, named_parameters
from petune.injector.new_weights_check import check_new_weights
from petune.injector.registry import TUNERS, build_tuner, parse_method, registered_name
from petune.injector.trainable import TrainableState, check_not_in_bank, open_trainable_state, trainable_state_of
from petune.injector.tuner import Tuner, TunerConfig
from petune.injector.unreached import warn_of_ignored_images
from petune.sites.find import find_sites, sites_for
from petune.sites.heads_by_user import HeadChoice
from petune.sites.logits import refuse_random
from petune.sites.new_weights import NewWeights, new_weights
from petune.sites.sites import Sites
from petune.sites.unsuitable import quantized_kind, refuse_uninitialized, why_method_fails

TRAINABLE_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128}
"""Those of which gradients exist: a float8 weight is floating point, too, but gets none."""


def attach(
    model: nn.Module,
    method: str | Tuner[Any] | TunerConfig,
    *,
    sites: Sites | None = None,
    name: str | None = None,
    train_head: bool = True,
    keep_original: bool = True,
    input_size: Sequence[int] | None = None,
    example: Any = None,
    head: HeadChoice | None = None,
    **options: Any,
) -> Attachment:
    """Attach a tuner to a model, in place.

    Args:
        model: Any image classifier, or with `example` any Transformer; not a compiled one. If `torch.compile(model)`
            exists already, it compiles again in its next call, as all compiled code of the process does.
        method: A registered name (options can be part of it: `vpt:deep=false`), a Tuner, or its config.
        sites: From `find_sites`; found now by default.
        name: Distinguishes attachments on one model. Defaults to the method's name.
        train_head: Train the classifier too.
        keep_original: Keep a copy of the values that will train (classifier, unfrozen backbone), so that `disable` and
            `detach` give the model back bit for bit. False saves the memory: a whole model for `full`.
        input_size: (channels, height, width), for a model that does not state its input size; with frames for videos.
            The first attachment on a model decides.
        example: What the forward takes, if that is not one image; see `petune.find_sites`. It is saved with the adapter
            as shapes. The first attachment on a model decides.
        head: The modules that are heads, if they are others than petune finds: a dotted path, a module of the model, a
            pattern of paths such as `*_embed`, or a list of them. They train as a whole. Their paths are saved.
        **options: The tuner's options, if `method` is a name.

    Raises:
        AlreadyCompiled: The model is compiled already.
        SiteNotFound: The model, or a block, has no site that the tuner needs.
        DeadSite: The forward never uses an adapter, or no gradient reaches it: the output does not depend on its block.
        AttachError: Something else is in the way. After any of these, the model is as it was.
        UsageError: `sites` is given, and also `input_size`, `example` or `head`; or both `example` and `input_size`;
            or `head` and train_head=False.
        UnknownName: There is no such method.
        PluginError: The method's package is broken.
        ConfigError: An option is unknown or has a wrong value, or the model has no such `blocks`.
    """
    _check_together(sites, input_size, example, head, train_head)
    return attach_tuner(
        model,
        method,
        options,
        sites=sites,
        name=name,
        train_head=train_head,
        keep_original=keep_original,
        find=lambda: find_sites(model, input_size, example=example, head=head),
        head=head,
    )


def attach_tuner(
    model: nn.Module,
    method: str | Tuner[Any] | TunerConfig,
    options: Mapping[str, Any] = MappingProxyType({}),
    *,
    sites: Sites | None,
    name: str | None,
    train_head: bool,
    find: Callable[[], Sites],
    keep_original: bool = True,
    head: HeadChoice | None = None,
    saved: SavedTraining | None = None,
) -> Attachment:
    """Attach a tuner; see `attach`.

    Args:
        model, method, options, sites, name, train_head, keep_original, head: See `attach`.
        find: Finds the sites of a model to which nothing is attached.
        saved: Of an adapter that is loaded. Who trained it has been warned of what the method leaves as it is.
    """
    advises = saved is None
    flags = {"train_head": (train_head, bool), "keep_original": (keep_original, bool)}
    _check_model(model)
    check_arguments("petune.attach", sites=(sites, Sites | None), name=(name, str | None), **flags)
    check_not_in_bank(model)
    with ordinary_tensors(model):
        tuner = copy.copy(build_tuner(method, **options))  # a tuner stores facts about its model, so copy it
        tuner.method = tuner.method or registered_name(type(tuner))
        name = name or (parse_method(method)[0] if isinstance(method, str) else _default_name(tuner))
        label = label_of(name)
        new = new_weights(model) if trainable_state_of(model) is None and train_head else NewWeights(is_known=False)
        given = _sites_for(model, sites, find, train_head, head, advises=advises)
        sites = given.choose(tuner.config.blocks)
        state = open_trainable_state(model, given, saved or SavedTraining())
        state.add(label)
        log = EditLog(label, undo_steps=[lambda: state.remove(label)])
        edit = Edit(model, sites, log, state)
        try:
            with plugin_errors(TUNERS, tuner.method, type(tuner), "was attached"), missing_sites_named(sites):
                _edit_model(edit, tuner)
            if type(tuner).calibrate is not Tuner.calibrate:
                add_calibration_state(model, log)
            attachment = Attachment(model, sites, tuner, name, log, state, train_head, keep_original)
            _check_trains(attachment)
            check_follows_blocks(attachment)
            _check_kinds_of_tensors(attachment)
            check_new_weights(attachment, new, advises=advises)
            check_used(attachment, state.holders, advises=advises)
            if advises:
                advise(attachment)
            forget_forwards(edit)
        except BaseException:
            log.undo()
            raise
    forget_compiled_code()
    return attachment


def _edit_model(edit: Edit, tuner: Tuner[Any]) -> None:
    """Let a tuner edit the model, and say so if quantized weights lack an operation that it needs.

    Raises:
        AttachError: They lack one.
    """
    try:
        tuner.attach(edit)
    except NotImplementedError as error:
        if not quantized_kind(edit.model):
            raise
        raise AttachError(f"{edit.name}: {why_method_fails(edit.model, error)}") from error


def _check_together(
    sites: Sites | None, input_size: Sequence[int] | None, example: Any, head: HeadChoice | None, train_head: bool
) -> None:
    for name, value in (("input_size", input_size), ("example", example), ("head", head)):
        if sites is not None and value is not None:
            raise UsageError(f"petune.attach: give sites or {name}, not both. find_sites takes {name}, too")
    if head is not None and not train_head:
        raise UsageError("petune.attach: train_head=False trains no head, so head would do nothing. Leave out one")


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise AttachError(f"attach takes an nn.Module, but was given {type(model).__name__}")
    _check_not_compiled(model)
    refuse_uninitialized(model)
    if any(p.is_inference() for p in model.parameters()):
        raise AttachError(
            f"{type(model).__name__} was made inside torch.inference_mode, so nothing of it can train. Build it outside"
        )
    if next(model.parameters(), None) is None:
        raise AttachError(f"{type(model).__name__} has no parameters. Attach to a model with weights")


def _sites_for(
    model: nn.Module,
    sites: Sites | None,
    find: Callable[[], Sites],
    train_head: bool,
    head: HeadChoice | None,
    *,
    advises: bool,
) -> Sites:
    """Return the sites to edit, after the checks that a model needs once: before its first attachment."""
    existing = trainable_state_of(model)
    _check_same_root(model, existing)
    if sites is None and existing is not None:
        sites = existing.sites if head is None else sites_for(model, existing.sites.input_spec, head)
    sites = sites or find()
    _check_sites_of(model, sites)
    if existing is None:
        refuse_random(model, sites)
        if advises:
            warn_of_layers_before_head(model, sites, train_head)
            warn_of_ignored_images(model, sites)
    return sites


def _default_name(tuner: Tuner[Any]) -> str:
    return tuner.method or type(tuner).__name__.lower()


def _check_not_compiled(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise AlreadyCompiled(
                f"{path or 'the model'} is compiled already and would not run the tuner. Attach to the model first, "
                "then torch.compile it"
            )


def _check_same_root(model: nn.Module, existing: TrainableState | None) -> None:
    """Check that everything is attached to the same module: two states would freeze each other's parameters.

    Raises:
        AttachError: Something is attached to a part of the model, or to a model that this one is a part of.
    """
    states = {path.rpartition(".")[0]: m for path, m in model.named_modules() if isinstance(m, TrainableState)}
    others = [path or "the model that this is a part of" for path, m in states.items() if m.model is not model]
    in_another_model = existing is None and any(hasattr(m, "is_petune_module") for m in model.modules())
    if others or in_another_model:
        other = others[0] if others else "another model that shares a part of this one"
        raise AttachError(
            f"something is attached already to {other}. Attach everything to the same module, or detach that first"
        )


def _check_sites_of(model: nn.Module, sites: Sites) -> None:
    own = {id(m) for m in model.modules()}
    not_own = [s.where for s in (*sites.blocks, *sites.parts.values()) if any(id(m) not in own for m in s.modules)]
    if not_own:
        raise AttachError(
            f"the sites are not this model's: {', '.join(not_own[:3])} is another module than the model's. The model "
            "is a copy, or the module was replaced (reset_classifier) after find_sites or while it was attached. "
            "In that case detach first. Attach without sites, or with find_sites(this model)"
        )


def _check_trains(attachment: Attachment) -> None:
    """Refuse a method that trains nothing; one with `num_parameters` 0 is a linear probe and trains the classifier."""
    if attachment.tuned:
        return
    if attachment.tuner.num_parameters(attachment.sites) == 0:
        if attachment.head:
            return
        raise AttachError(
            f"{attachment.name} trains only the classifier, but with train_head=False it would train nothing. Use "
            "train_head=True, on a model with a classifier, or a method that trains something else, such as adaptformer"
        )
    if attachment.tensors.fixed:
        raise AttachError(
            f"{attachment.name} would train nothing: all parameters that it adds have requires_grad=False, such as "
            f"{next(iter(attachment.tensors.fixed))}. Copies of frozen layers are frozen too: call "
            "requires_grad_(True) on what should train, and register constants as buffers"
        )
    if attachment.edit_log.unused:
        raise DeadSite(
            f"{attachment.name} would learn nothing in {attachment.sites.model}: no gradient reaches "
            f"{plural(len(attachment.edit_log.unused), 'tensor')} that it would train. The output does not depend on "
            "them, or the forward computes with them under torch.no_grad(), as reversible layers do. Use linear, which "
            "trains the head alone, or build the model without reversible layers"
        )
    if attachment.edit_log.placed:
        adapter = described(attachment.edit_log.placed[0].holder.adapter)
        raise AttachError(
            f"{attachment.name} would train nothing: {adapter} has no parameters. Make its tensors attributes of type "
            "nn.Parameter, and keep several in an nn.ParameterList or nn.ModuleList, not in a list"
        )
    is_own = not type(attachment.tuner).__module__.startswith("petune.")
    advice = ". A method of your own trains what verbs put in or unfreeze, and edit.add_parameters registers"
    raise AttachError(
        f"{attachment.name} found nothing to train in {attachment.sites.model}. Use another method, or linear to train "
        f"only the classifier{advice if is_own else ''}"
    )


def _check_kinds_of_tensors(attachment: Attachment) -> None:
    """Check that quantized weights stay frozen and that the fingerprint can read them, before training."""
    trainable = attachment.tensors.trainable()
    for key, tensor in named_parameters(attachment.model).items():
        parts = plain_parts(key, tensor)
        if key in trainable and any(part.dtype not in TRAINABLE_DTYPES for _, part in parts):
            raise AttachError(
                f"{attachment.name} would train {key}, which is quantized ({type(tensor).__name__}). Use a method "
                "that keeps it frozen, such as adaptformer, or a backbone in full precision (base_precision=auto); for "
                "a classifier, also train_head=False"
            )
