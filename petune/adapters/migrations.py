"""Bring an adapter's configuration that an older petune wrote to the current format, one step at a time.

Format 1: `behaviour: {scores, tolerance}`, `pictures`, `num_pictures`; `seed` stands for the Paddle study's settings.
Format 2: `reference_logits: {logits, tolerance}`, `images`, `num_images`; `paddle_study`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from petune.base.errors import CheckpointError

FORMAT = 2
"""The format that petune writes."""

Config = dict[str, Any]


def migrate(config: Mapping[str, Any], source: object = "the adapter") -> Config:
    """Return an adapter's configuration in the current format.

    Args:
        config: petune's part of `adapter_config.json`.
        source: The adapter's path, for messages.

    Raises:
        CheckpointError: A newer petune wrote it.
        KeyError, TypeError, ValueError: It has no format, or another form.
    """
    version = int(config["format"])
    if version > FORMAT:
        raise CheckpointError(
            f"{source} has format {version}, and this petune reads formats up to {FORMAT}. Upgrade it: pip install -U "
            "petune"
        )
    if version < 1:
        raise ValueError(f"there is no format {version}")
    migrated = dict(config)
    for step in STEPS[version - 1 :]:
        migrated = step(migrated)
    return migrated | {"format": FORMAT}


def _from_1_to_2(config: Config) -> Config:
    """Rename keys and values to the words of format 2."""
    logits = config.pop("behaviour", None)
    if isinstance(logits, Mapping):
        logits = _renamed(logits, {"scores": "logits"})
    options = config["config"]
    if config["tuner"] == "adaptformer" and options.get("variant") == "seed":
        options = {**options, "variant": "paddle_study"}
    return {**config, "reference_logits": logits, "config": options, "metadata": _metadata_2(config["metadata"])}


def _metadata_2(metadata: Mapping[str, Any]) -> Config:
    """Rename what `petune run` wrote into the metadata; anything else there is the user's own."""
    renamed = _renamed(metadata, {"pictures": "images"})
    if isinstance(renamed.get("test"), Mapping):
        renamed["test"] = _renamed(renamed["test"], {"num_pictures": "num_images"})
    if isinstance(renamed.get("method"), str):
        renamed["method"] = renamed["method"].replace("variant=seed", "variant=paddle_study")
    backbone = renamed.get("backbone")
    if isinstance(backbone, Mapping) and backbone.get("name") == "vit_seed":
        renamed["backbone"] = {**backbone, "name": "vit_paddle_study"}
    return renamed


def _renamed(values: Mapping[str, Any], names: Mapping[str, str]) -> Config:
    return {names.get(key, key): value for key, value in values.items()}


STEPS: list[Callable[[Config], Config]] = [_from_1_to_2]
"""The step at index i brings format i + 1 to format i + 2."""
