"""Rebuild the model of a run from its adapter directory: the backbone, with the adapter loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petune.adapters.format import SavedAdapter
from petune.backbones.create import Backbone, create_backbone
from petune.base.errors import CheckpointError, PluginError, UnknownName, WeightsUnavailable
from petune.injector.attachment import Attachment
from petune.injector.load import attach_saved
from petune.runner.prepare import with_head_of
from petune.runner.run_adapter import InitialValues, read_run_adapter, user_code_of
from petune.training.task import Task
from petune.training.task_registry import restore_task


@dataclass(frozen=True)
class Restored:
    """The model of a run.

    Attributes:
        backbone: Its model has the adapter attached.
        attachment: The adapter.
        task: What the run trained for.
        metadata: What the run recorded: backbone, classes, preprocess, dataset, test.
    """

    backbone: Backbone
    attachment: Attachment
    task: Task[Any]
    metadata: dict[str, Any]


def restore(path: Path, weights: str | None = None, *, trust_remote_code: bool = False) -> Restored:
    """Rebuild the backbone of a run and load its adapter.

    Args:
        path: A run directory, or the adapter directory in it.
        weights: Where the backbone's weights are now; None takes them from where the run did.
        trust_remote_code: Allow a backbone that is built by the function `package.module:factory`.

    Raises:
        CheckpointError: There is no adapter, it is damaged, or it needs code that is not trusted.
        PluginError: Its method or its task is not installed.
        BackboneMismatch: The weights are different ones.
        WeightsUnavailable: The weights are no longer available.
    """
    saved = read_run_adapter(path)
    backbone = rebuild_backbone(saved, weights, trust_remote_code=trust_remote_code)
    return Restored(backbone, attach_saved(backbone.model, saved), task_of(saved), saved.config["metadata"])


def rebuild_backbone(saved: SavedAdapter, weights: str | None = None, *, trust_remote_code: bool = False) -> Backbone:
    """Rebuild the backbone of an adapter, with nothing attached; `petune.AdapterBank` takes its model.

    Args:
        saved: From `read_run_adapter`.
        weights, trust_remote_code: See `restore`.

    Raises:
        WeightsUnavailable: The weights are no longer available.
        PluginError: The adapter's task is not installed.
        CheckpointError: The description of the backbone is damaged, or it needs code that is not trusted.
    """
    if not trust_remote_code:
        check_no_user_code(saved, str(saved.path))
    metadata = saved.config["metadata"]
    recorded = metadata["backbone"]
    task = task_of(saved)
    try:
        initial = InitialValues.of(saved)
        arguments: dict[str, Any] = {key: recorded[key] for key in ("image_size", "patch_size", "options", "head")}
        arguments |= {key: recorded.get(key) for key in ("channels", "num_frames")}
        arguments |= {"base_precision": recorded.get("base_precision", "auto")}
        arguments |= {"seed": initial.seed, "initial_classes": initial.num_classes}
        name = recorded["name"]
        source = weights or recorded.get("weights_option", "default")
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{saved.path} does not record how its backbone was built: {error!r}") from None
    try:
        backbone = create_backbone(name, weights=source, num_classes=task.num_outputs(), **arguments)
    except WeightsUnavailable as error:
        if weights is not None:
            raise
        raise WeightsUnavailable(
            f"the weights that {saved.path} was trained on are not available: {error}. Say where they are with "
            "weights=…",
            cli_hint="Name them with --weights",
        ) from error
    return with_head_of(task, backbone, initial.seed)


def task_of(saved: SavedAdapter) -> Task[Any]:
    """Return the task that an adapter was trained for.

    Raises:
        PluginError: The package of the task is not installed.
        CheckpointError: The description of the task is damaged.
    """
    try:
        return restore_task(saved.config["metadata"])
    except UnknownName as error:
        raise PluginError(
            f"{saved.path} was trained for the task {error.name!r}, which no installed package has. Install its "
            f"package first, such as pip install petune-{error.name}"
        ) from None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{saved.path} does not record the task it was trained for: {error!r}") from None


def check_no_user_code(saved: SavedAdapter, source: str) -> None:
    """Refuse a backbone named `package.module:factory`, which calls any function with any arguments.

    Args:
        saved: An adapter, perhaps from someone else.
        source: Where it came from, for the message.

    Raises:
        CheckpointError: Its backbone is built by code outside petune, timm, torchvision and transformers.
    """
    name = user_code_of(saved)
    if name:
        raise CheckpointError(
            f"{source} has a backbone that is built by {name}, code that would run here. If you trust that code, use "
            "trust_remote_code=True. Otherwise build the model yourself and call petune.load(model, directory)",
            cli_hint="Add --trust-remote-code if you trust it",
        )
