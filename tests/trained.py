"""Adapter directories as `petune run` writes them, in a moment: values far from their start instead of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

import petune
from petune.backbones.create import Backbone, create_backbone
from petune.base.files import write_directory
from tests.tiny import randomised

NANO = {"depth": 1, "embed_dim": 48}
SWIN = {"window_size": 4, "embed_dim": 24, "depths": [2], "num_heads": [2]}
CLASSES = ("cat", "dog", "<owl>")


def saved_run(
    place: Path, method: str, backbone: str = "vit_nano", image_size: int = 32, **options: object
) -> tuple[Path, petune.Attachment]:
    """An adapter directory of three classes, and the model it came from."""
    built: dict[str, object] = dict(SWIN if backbone.startswith("swin") else NANO)
    made = create_backbone(backbone, weights="none", num_classes=3, image_size=image_size, options=built)
    torch.manual_seed(1)
    att = randomised(petune.attach(made.model, method, **options))
    att.save(place, metadata=card(made, backbone, built))
    return place, att


def card(made: Backbone, name: str, options: dict[str, object]) -> dict[str, object]:
    """What a run says of itself in its adapter directory."""
    said = {"name": name, "full_name": made.full_name, "weights": "none", "weights_option": "none", "seed": 0}
    return {
        "backbone": {**said, "image_size": made.image_size, "patch_size": None, "options": options, "head": "linear"},
        "classes": list(CLASSES),
        "preprocess": {"image_size": made.image_size, "mean": [0.5] * 3, "std": [0.5] * 3},
        "dataset": "folder:pets",
    }


def changed(adapter: Path, to: Path, **said: Any) -> Path:
    """A copy of an adapter whose `metadata` says something else."""
    files = {file.name: file.read_bytes() for file in adapter.iterdir() if file.name != "manifest.json"}
    config = json.loads(files["adapter_config.json"])
    config["metadata"].update(said)
    if "classes" in said and "task" not in said and "task" in config["metadata"]:
        config["metadata"]["task"]["target"]["names"] = list(said["classes"])
    write_directory(to, {**files, "adapter_config.json": json.dumps(config).encode()})
    return to
