"""Bring an adapter's configuration that an older petune wrote to the current format, one step at a time.

Format 1: `behaviour: {scores, tolerance}`, `pictures`, `num_pictures`; `seed` stands for the Paddle study's settings.
Format 2: `reference_logits: {logits, tolerance}`, `images`, `num_images`; `paddle_study`.
Format 3: in the metadata of a run, metrics by name and `metric_info` instead of `top1`, `top5` and `val_top1`.
Format 4: fingerprints without names, which are `named_fingerprint` and `named_head_fingerprint` in older files;
`addresses` of the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from petune.base.errors import CheckpointError
from petune.base.text import has_top5

FORMAT = 4
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


def _from_2_to_3(config: Config) -> Config:
    """Put the accuracy that `petune run` wrote into the metadata under the names of the metrics."""
    metadata = config["metadata"]
    test = metadata.get("test") if isinstance(metadata, Mapping) else None
    names = ("top1", "top5")
    if not isinstance(test, Mapping) or not all(isinstance(test.get(name), int | float) for name in names):
        return config
    others = {key: value for key, value in test.items() if key not in names}
    classes = metadata.get("classes")
    changes: Config = {
        "test": {"metrics": {name: test[name] for name in names}, **others},
        "metric_info": classification_metrics(len(classes) if isinstance(classes, list | tuple) else None),
    }
    training = metadata.get("training")
    if isinstance(training, Mapping):
        val = training.get("val_top1")
        kept = {key: value for key, value in training.items() if key != "val_top1"}
        changes["training"] = {"val_metrics": None if val is None else {"top1": val}, **kept}
    return {**config, "metadata": {**metadata, **changes}}


def _from_3_to_4(config: Config) -> Config:
    """Set the fingerprints apart, which were computed with the names of the tensors."""
    names: dict[str, str] = {key: f"named_{key}" for key in config if key in {"fingerprint", "head_fingerprint"}}
    return {**_renamed(config, names), **dict.fromkeys(names)}


def classification_metrics(num_classes: int | None) -> list[Config]:
    """Return the metrics that older versions recorded, in the form of `petune.Metric`.

    Args:
        num_classes: With five or fewer, top-5 is left out; None if it is not known.
    """
    metrics = [{"name": "top1", "label": "top-1"}, {"name": "top5", "label": "top-5"}]
    return [{**metric, "percent": True} for metric in (metrics if has_top5(num_classes) else metrics[:1])]


def _renamed(values: Mapping[str, Any], names: Mapping[str, str]) -> Config:
    return {names.get(key, key): value for key, value in values.items()}


STEPS: list[Callable[[Config], Config]] = [_from_1_to_2, _from_2_to_3, _from_3_to_4]
"""The step at index i brings format i + 1 to format i + 2."""
