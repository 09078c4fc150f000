"""From an adapter directory that a run wrote back to the model: the backbone built again, the adapter on it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petune.attach import Attachment
from petune.backbones import Backbone, create_backbone
from petune.errors import CheckpointError
from petune.state import attach_saved, read_adapter


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


def restore(path: Path, weights: str | None = None) -> Restored:
    """Build the backbone of a run again and load its adapter.

    Args:
        path: A run directory, or the adapter directory in it.
        weights: Where the backbone's weights are now; None takes them from where the run did.

    Raises:
        CheckpointError: No adapter, or one that was saved without saying which backbone it belongs to.
        BackboneMismatch, WeightsUnavailable: The weights are others, or are not there any more.
    """
    place = path / "adapter" if (path / "adapter").is_dir() else path
    saved = read_adapter(place)
    card = saved.config["metadata"]
    if not {"backbone", "classes"} <= card.keys():
        raise CheckpointError(
            f"{place} must say which backbone it belongs to, as adapters of `petune run` do, but does not. Build the "
            "model yourself, and petune.load(model, directory)"
        )
    said = card["backbone"]
    backbone = create_backbone(
        said["name"],
        weights=weights or said.get("weights_option", "default"),
        num_classes=len(card["classes"]),
        image_size=said["image_size"],
        patch_size=said["patch_size"],
        options=said["options"],
        head=said["head"],
        seed=said.get("seed", 0),
    )
    return Restored(backbone, attach_saved(backbone.model, saved), card)
