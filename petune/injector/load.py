"""`load`: attach a saved adapter to the backbone that it belongs to, and fill in its tensors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from petune.adapters.format import SavedAdapter, adapter_path, read_adapter
from petune.adapters.peft_names import with_current_names
from petune.base.arguments import PathText, check_arguments
from petune.base.config import expand_home
from petune.base.errors import AttachError, BackboneMismatch, CheckpointError, PluginError
from petune.injector.attach import attach_tuner
from petune.injector.attachment import Attachment
from petune.injector.fits import check_fits, check_reference_logits, head_keys_in_file
from petune.injector.fixed_parameters import SavedTraining
from petune.injector.registry import build_tuner, list_tuners
from petune.injector.renamed import with_current_keys
from petune.injector.saved_sites import other_sites, saved_sites
from petune.injector.trainable import check_not_in_bank
from petune.injector.tuner import Tuner
from petune.sites.find import find_sites
from petune.sites.forward import forget_caches
from petune.sites.sites import Sites


def load(
    model: nn.Module,
    path: str | Path,
    *,
    name: str | None = None,
    tuner: Tuner[Any] | None = None,
    sites: Sites | None = None,
) -> Attachment:
    """Attach an adapter that `Attachment.save` or PEFT wrote.

    Args:
        model: The backbone that the adapter was trained on, with a classifier of as many classes.
        path: The adapter directory, or the run directory that it is in.
        name: The attachment's name. Defaults to the method's.
        tuner: The method, if it is not registered; its options must be those of the file.
        sites: The model's sites; found by default, for images of the size in the file.

    Raises:
        BackboneMismatch: The backbone has another geometry, other weights or another number of classes. The model is
            as it was.
        CheckpointError: The directory is damaged, incomplete or from a newer petune, or `tuner` has other options.
        PluginError: The method's package is missing or broken.
    """
    kinds = {"name": (name, str | None), "tuner": (tuner, Tuner | None), "sites": (sites, Sites | None)}
    check_arguments("petune.load", model=(model, nn.Module), path=(path, PathText), **kinds)
    return attach_saved(model, read_adapter(adapter_path(expand_home(path))), name=name, tuner=tuner, sites=sites)


def attach_saved(
    model: nn.Module,
    saved: SavedAdapter,
    *,
    name: str | None = None,
    tuner: Tuner[Any] | None = None,
    sites: Sites | None = None,
) -> Attachment:
    """Attach an adapter that was read already; see `load`."""
    check_not_in_bank(model)
    saved = with_current_names(model, saved)
    config = saved.config
    if tuner is None:
        tuner = _build_saved_tuner(saved)
    else:
        _check_options(tuner, saved)
    name, as_saved = name or config["tuner"], saved_sites(model, saved, sites)
    try:
        attachment = attach_tuner(
            model,
            tuner,
            sites=as_saved,
            name=name,
            train_head=config["train_head"],
            find=lambda: find_sites(model),
            saved=SavedTraining.of(saved),
        )
    except AttachError as error:
        reason = other_sites(model, saved) if as_saved is None else ""
        if not reason:
            raise
        raise BackboneMismatch(f"{saved.path} belongs to another backbone: {reason}") from error
    try:
        saved = with_current_keys(attachment, saved)
        check_fits(attachment, saved)
        fill(attachment, saved)
    except BaseException:
        attachment.detach()
        raise
    return attachment


def start_from(attachment: Attachment, saved: SavedAdapter, *, with_head: bool) -> None:
    """Give an attachment the values of a saved adapter, to train on from there.

    Args:
        attachment: Of the same method, on the same backbone.
        saved: The adapter.
        with_head: Take its classifier too. Without it the attachment keeps its own, which may have other classes, or
            be the head of another kind of task.

    Raises:
        BackboneMismatch: See `load`.
    """
    saved = with_current_keys(attachment, saved)
    if with_head:
        check_fits(attachment, saved)
        fill(attachment, saved)
        return
    head = head_keys_in_file(attachment) | _other_head_keys(attachment, saved)
    without_head = replace(saved, tensors={key: t for key, t in saved.tensors.items() if key not in head})
    check_fits(attachment, without_head, with_head=False)
    _copy_tensors(attachment, without_head)


def has_other_head(attachment: Attachment, saved: SavedAdapter) -> bool:
    """Return whether the head of a saved adapter has tensors of other shapes than that of the attachment."""
    own, saved = attachment.file_state(), with_current_keys(attachment, saved)
    return any(
        key in saved.tensors and saved.tensors[key].shape != own[key].shape for key in head_keys_in_file(attachment)
    )


def _other_head_keys(attachment: Attachment, saved: SavedAdapter) -> set[str]:
    """Return the file's keys of a head that is not in this model: that of another kind of task."""
    modules = dict(attachment.model.named_modules())

    def is_gone(key: str) -> bool:
        parts = key.removeprefix("base_model.model.").split(".")[:-1]
        paths = [".".join(parts[: i + 1]) for i in range(len(parts))]
        return bool(paths) and (
            paths[0] not in modules or any(isinstance(modules.get(path), nn.Identity) for path in paths)
        )

    return {key for key in saved.tensors.keys() - attachment.file_state().keys() if is_gone(key)}


def fill(attachment: Attachment, saved: SavedAdapter) -> None:
    """Copy the saved tensors in, and check that the model computes what it did when they were saved.

    Args:
        attachment: One that `check_fits` accepts.
        saved: The adapter.

    Raises:
        BackboneMismatch: The model computes something else.
        CheckpointError: The saved reference logits cannot be read.
    """
    _copy_tensors(attachment, saved)
    if attachment.tensors.are_alone():
        check_reference_logits(attachment, saved)


def _copy_tensors(attachment: Attachment, saved: SavedAdapter) -> None:
    with torch.no_grad():
        for key, target in attachment.file_state().items():
            if key in saved.tensors:  # `check_fits` has warned about buffers that are not
                target.copy_(saved.tensors[key])
    forget_caches(attachment.model)


def _build_saved_tuner(saved: SavedAdapter) -> Tuner[Any]:
    method = saved.config["tuner"]
    if method.partition(":")[0] not in {record.name for record in list_tuners()}:
        package = saved.config.get("distribution") or "a package that is not recorded"
        raise PluginError(
            f"{saved.path} needs the method {method!r}, which is not installed. Install the package that it was saved "
            f"with: {package} {saved.config.get('version') or ''}".rstrip()
        )
    return build_tuner(method, **saved.config["config"])


def _check_options(tuner: Tuner[Any], saved: SavedAdapter) -> None:
    options = tuner.config.plain()
    different = {k: v for k, v in saved.config["config"].items() if options.get(k) != v}
    if different:
        shown = [f"{key} is {value!r} there and {options.get(key)!r} here" for key, value in different.items()]
        raise CheckpointError(
            f"{saved.path} was saved with other options: {', '.join(shown)}. Build {type(tuner).__name__} with those "
            "of the file"
        )
