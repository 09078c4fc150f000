"""From an adapter directory that a run wrote back to the model: the backbone built again, the adapter on it."""

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
from petune.runner.run_dir import why_no_adapter


@dataclass(frozen=True)
class Restored:
    """A trained model.

    Attributes:
        backbone: With the adapter on its model.
        attachment: The adapter.
        card: What the run said of itself: backbone, classes, preprocess, dataset, test.
    """

    backbone: Backbone
    attachment: Attachment
    card: dict[str, Any]


def restore(path: Path, weights: str | None = None, *, trust_remote_code: bool = False) -> Restored:
    """Build the backbone of a run again and load its adapter.

    Args:
        path: A run directory, or the adapter directory in it.
        weights: Where the backbone's weights are now; None takes them from where the run did.
        trust_remote_code: Call the function that builds the backbone, where it is `package.module:factory`.

    Raises:
        CheckpointError: See `read_run` and `refuse_code`.
        BackboneMismatch, WeightsUnavailable: The weights are others, or are not there any more.
    """
    saved = read_run(path)
    backbone = plain_backbone(saved, weights, trust_remote_code=trust_remote_code)
    return Restored(backbone, attach_saved(backbone.model, saved), saved.config["metadata"])


def read_run(path: Path) -> SavedAdapter:
    """The adapter of a run, which says in its `metadata` which backbone it belongs to and what its classes are.

    Args:
        path: A run directory, or the adapter directory in it.

    Raises:
        CheckpointError: No adapter, a damaged one, or one that was saved without saying that.
    """
    place = adapter_path(expand_home(path))
    if not (place / CONFIG_FILE).is_file():
        raise CheckpointError(why_no_adapter(place))
    saved = read_adapter(place)
    if not {"backbone", "classes", "preprocess"} <= saved.config["metadata"].keys():
        raise CheckpointError(
            f"{place} must say which backbone it belongs to, as adapters of `petune run` do, but does not. Build the "
            "model yourself, and petune.load(model, directory)"
        )
    return saved


def plain_backbone(saved: SavedAdapter, weights: str | None = None, *, trust_remote_code: bool = False) -> Backbone:
    """The backbone that an adapter belongs to, nothing attached; `petune.AdapterBank` takes its model.

    Args:
        saved: Of `read_run`.
        weights, trust_remote_code: As for `restore`.

    Raises:
        WeightsUnavailable: The weights are not there any more.
        CheckpointError: What is said of the backbone cannot be read; see `refuse_code` too.
    """
    if not trust_remote_code:
        refuse_code(saved, str(saved.path))
    card = saved.config["metadata"]
    said = card["backbone"]
    try:
        built = {key: said[key] for key in ("image_size", "patch_size", "options", "head")}
        name, source = said["name"], weights or said.get("weights_option", "default")
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{saved.path} must say how its backbone was built, but: {error!r}") from None
    try:
        return create_backbone(
            name, weights=source, num_classes=len(card["classes"]), seed=said.get("seed", 0), **built
        )
    except WeightsUnavailable as error:
        if weights is not None:
            raise
        raise WeightsUnavailable(
            f"the weights that {saved.path} was trained on must be there; say where they are by --weights (in Python "
            f"weights=…). {error}"
        ) from error


def refuse_code(saved: SavedAdapter, where: str) -> None:
    """Refuse a backbone named `package.module:factory`: that is a call of any function, with any arguments.

    Args:
        saved: An adapter, perhaps somebody else's.
        where: It came from.

    Raises:
        CheckpointError: Its backbone is built by code that does not come with petune, timm, torchvision, transformers.
    """
    backbone = saved.config["metadata"].get("backbone")
    said = backbone if isinstance(backbone, Mapping) else {}
    name, options = str(said.get("name", "")), said.get("options")
    if calls_user_code(name) or (isinstance(options, Mapping) and options.get("trust_remote_code")):
        raise CheckpointError(
            f"{where} has its backbone built by {name}, code that using it would run here. If you know that code, add "
            "--trust-remote-code (in Python trust_remote_code=True); else build the model yourself, and "
            "petune.load(model, directory)"
        )
