"""Adapters that PEFT alone wrote, where transformers has renamed the modules of the model since.

Such a file has the library's module names only. transformers 5 knows for each of its models which names its
checkpoints had before, and applies these renames when it loads weights; here they are applied to the adapter's layers.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from petune.adapters.format import SavedAdapter
from petune.base.errors import BackboneMismatch

PREFIX = "base_model.model."
RESOLVED = ("exclude_modules", "layers_to_transform", "layers_pattern")
"""Options that choose layers; they have done so when the file was written."""


def with_current_names(model: nn.Module, saved: SavedAdapter) -> SavedAdapter:
    """Return a saved adapter with the names that the layers have in the model.

    Args:
        model: The model, with or without the adapter.
        saved: Any adapter; only those that PEFT alone wrote change.

    Raises:
        BackboneMismatch: PEFT alone wrote it, and it has layers that the model does not have.
    """
    if saved.config["tuner"] != "peft" or saved.config["geometry"] is not None:
        return saved
    modules = {re.sub(r"\.base_layer\b", "", path) for path, _ in model.named_modules()}
    layers = {path for key in saved.tensors if (path := layer_path(key, saved.config["config"]["type"]))}
    if layers <= modules:
        return saved
    rename = checkpoint_renames(model)
    names = {path: rename(f"{path}.weight").removesuffix(".weight") for path in sorted(layers)}
    missing = [path for path, name in names.items() if name not in modules]
    if missing or len({*names.values()}) < len(names):
        raise BackboneMismatch(
            f"{saved.path} has layers that {type(model).__name__} does not have, such as {[*missing, *names][0]}. "
            "PEFT wrote it, with the names of the modules and nothing else. If it is the right model and the library "
            "has renamed them, load it with the version that it was trained with, and save it with petune"
        )

    def renamed_key(key: str) -> str:
        path = layer_path(key, saved.config["config"]["type"])
        if path is not None:
            return PREFIX + names[path] + key.removeprefix(PREFIX + path)
        return PREFIX + rename(key.removeprefix(PREFIX)) if key.startswith(PREFIX) else key

    config = {**saved.config, "config": renamed_options(saved.config["config"], names)}
    return replace(saved, config=config, tensors={renamed_key(key): t for key, t in saved.tensors.items()})


def layer_path(key: str, kind: str) -> str | None:
    """Return the path of the layer that a tensor of an adapter belongs to; None if it belongs to none.

    Args:
        key: The tensor's name in the file.
        kind: The PEFT type, in lower case.
    """
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    prefixes = {str(k.value).lower(): prefix for k, prefix in PEFT_TYPE_TO_PREFIX_MAPPING.items()}
    parts = key.removeprefix(PREFIX).split(".")
    adapter = next((i for i, part in enumerate(parts) if part.startswith(prefixes.get(kind) or "\n")), 0)
    if not key.startswith(PREFIX) or not adapter:
        return None
    return ".".join(part for part in parts[:adapter] if part != "base_layer")


def checkpoint_renames(model: nn.Module) -> Callable[[str], str]:
    """Return a function from a weight's name in an older checkpoint to its name in the model.

    Names that transformers does not know, or whose weights it converts, stay as they are.
    """
    library = sys.modules.get("transformers")
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:  # not installed, or transformers 4
        library = None
    if library is None:
        return lambda key: key
    parts: dict[str, tuple[list[Any], list[Any]]] = {}
    for path, module in model.named_modules():
        start = f"{path}." if path else ""
        if isinstance(module, library.PreTrainedModel) and not any(start.startswith(other) for other in parts):
            transforms = get_model_conversion_mapping(module)
            renames = [t for t in transforms if isinstance(t, WeightRenaming)]
            parts[start] = renames, [t for t in transforms if not isinstance(t, WeightRenaming)]

    def rename(key: str) -> str:
        start = next((start for start in parts if key.startswith(start)), None)
        if start is None:
            return key
        name, converted = rename_source_key(key.removeprefix(start), *parts[start])
        return key if converted else start + name

    return rename


def renamed_options(options: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return options of a PEFT type for layers that have other names.

    Args:
        options: As in the file: layers by their names, the ends of them, or regular expressions.
        names: By the path of every layer in the file, its path in the model.
    """
    renamed = {key: value for key, value in options.items() if key not in RESOLVED}
    renamed["target_modules"] = sorted(names.values())
    if renamed.get("feedforward_modules"):
        wanted = renamed["feedforward_modules"]
        renamed["feedforward_modules"] = sorted(name for path, name in names.items() if _is_chosen(path, wanted))
    for key, values in renamed.items():
        if key.endswith("_pattern") and isinstance(values, Mapping):
            renamed[key] = {name: values[p] for path, name in names.items() for p in _first_match(path, values)}
    return renamed


def _is_chosen(path: str, wanted: str | list[str]) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, path) is not None
    return any(path == end or path.endswith(f".{end}") for end in wanted)


def _first_match(path: str, patterns: Mapping[str, Any]) -> list[str]:
    """Return the first pattern that PEFT matches to a layer, in a list; an empty one if there is none."""
    return [p for p in patterns if re.match(rf"(.*\.)?({p})$", path)][:1]
