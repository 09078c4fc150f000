"""Rebuild the model of a run from its adapter directory: the backbone, with the adapter loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petune.adapters.format import CONFIG_FILE, SavedAdapter, adapter_path, read_adapter
from petune.backbones.create import Backbone, create_backbone
from petune.backbones.names import calls_user_code
from petune.base.config import expand_home
from petune.base.errors import CheckpointError, WeightsUnavailable
from petune.injector.attachment import Attachment
from petune.injector.load import attach_saved
from petune.runner.directory_kind import explain_missing_adapter


@dataclass(frozen=True)
class Restored:
    """The model of a run.

    Attributes:
        backbone: Its model has the adapter attached.
        attachment: The adapter.
        metadata: What the run recorded: backbone, classes, preprocess, dataset, test.
    """

    backbone: Backbone
    attachment: Attachment
    metadata: dict[str, Any]


def restore(path: Path, weights: str | None = None, *, trust_remote_code: bool = False) -> Restored:
    """Rebuild the backbone of a run and load its adapter.

    Args:
        path: A run directory, or the adapter directory in it.
        weights: Where the backbone's weights are now; None takes them from where the run did.
        trust_remote_code: Allow a backbone that is built by the function `package.module:factory`.

    Raises:
        CheckpointError: There is no adapter, it is damaged, or it needs code that is not trusted.
        BackboneMismatch: The weights are different ones.
        WeightsUnavailable: The weights are no longer available.
    """
    saved = read_run_adapter(path)
    backbone = rebuild_backbone(saved, weights, trust_remote_code=trust_remote_code)
    return Restored(backbone, attach_saved(backbone.model, saved), saved.config["metadata"])


def read_run_adapter(path: Path) -> SavedAdapter:
    """Read the adapter of a run, whose metadata describes its backbone and its classes.

    Args:
        path: A run directory, or the adapter directory in it.

    Raises:
        CheckpointError: There is no adapter, it is damaged, or its metadata lacks the description.
    """
    directory = find_adapter(path)
    saved = read_adapter(directory)
    if not {"backbone", "classes", "preprocess"} <= saved.config["metadata"].keys():
        raise CheckpointError(
            f"{directory} does not record its backbone, because it was not saved by `petune run`. Build the model "
            "yourself and call petune.load(model, directory)"
        )
    return saved


def find_adapter(path: Path) -> Path:
    """Return the adapter directory of a run directory, or the path itself if it is one.

    Raises:
        CheckpointError: It is neither; the message says what the directory is.
    """
    directory = adapter_path(expand_home(path))
    if not (directory / CONFIG_FILE).is_file():
        raise CheckpointError(explain_missing_adapter(directory))
    return directory


def rebuild_backbone(saved: SavedAdapter, weights: str | None = None, *, trust_remote_code: bool = False) -> Backbone:
    """Rebuild the backbone of an adapter, with nothing attached; `petune.AdapterBank` takes its model.

    Args:
        saved: From `read_run_adapter`.
        weights, trust_remote_code: See `restore`.

    Raises:
        WeightsUnavailable: The weights are no longer available.
        CheckpointError: The description of the backbone is damaged, or it needs code that is not trusted.
    """
    if not trust_remote_code:
        check_no_user_code(saved, str(saved.path))
    metadata = saved.config["metadata"]
    recorded = metadata["backbone"]
    try:
        arguments = {key: recorded[key] for key in ("image_size", "patch_size", "options", "head")}
        name = recorded["name"]
        source = weights or recorded.get("weights_option", "default")
        seed = recorded.get("seed", 0)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{saved.path} does not record how its backbone was built: {error!r}") from None
    try:
        return create_backbone(name, weights=source, num_classes=len(metadata["classes"]), seed=seed, **arguments)
    except WeightsUnavailable as error:
        if weights is not None:
            raise
        raise WeightsUnavailable(
            f"the weights that {saved.path} was trained on are not available: {error}. Say where they are with "
            "weights=…",
            cli_hint="Name them with --weights",
        ) from error


def check_no_user_code(saved: SavedAdapter, source: str) -> None:
    """Refuse a backbone named `package.module:factory`, which calls any function with any arguments.

    Args:
        saved: An adapter, perhaps from someone else.
        source: Where it came from, for the message.

    Raises:
        CheckpointError: Its backbone is built by code outside petune, timm, torchvision and transformers.
    """
    backbone = saved.config["metadata"].get("backbone")
    recorded = backbone if isinstance(backbone, Mapping) else {}
    name, options = str(recorded.get("name", "")), recorded.get("options")
    if calls_user_code(name) or (isinstance(options, Mapping) and options.get("trust_remote_code")):
        raise CheckpointError(
            f"{source} has a backbone that is built by {name}, code that would run here. If you trust that code, use "
            "trust_remote_code=True. Otherwise build the model yourself and call petune.load(model, directory)",
            cli_hint="Add --trust-remote-code if you trust it",
        )
