"""`adapter_config.json` as PEFT reads it: petune's configuration is a part of the file, or all of it.

A method of PEFT's own (LoRA, IA3, ...) has PEFT's keys at the top of the file, and petune's configuration in
`auto_mapping`, the only entry of PEFT's that may hold anything. A tuner of petune's has petune's keys at the top, and
`peft_type` PETUNE.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from typing import Any

from petune.adapters.migrations import FORMAT
from petune.base.errors import CheckpointError

OWN_TYPE = "PETUNE"
"""The `peft_type` of an adapter that a tuner of petune's made."""
NOT_OPTIONS = {
    "peft_type",
    "peft_version",
    "auto_mapping",
    "inference_mode",
    "base_model_name_or_path",
    "revision",
    "task_type",
}
"""Keys of a PEFT adapter config that are not options of the method."""
WITHOUT_EFFECT = {"OFT": {"module_dropout"}}
"""Options that PEFT accepts and never applies, by type. petune refuses them for new adapters."""


def as_peft(config: Mapping[str, Any], peft_config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the content of `adapter_config.json`.

    Args:
        config: petune's configuration.
        peft_config: PEFT's own configuration, for a method of PEFT's.
    """
    if peft_config is None:
        return {"peft_type": OWN_TYPE, **config}
    return {**peft_config, "auto_mapping": {"petune": dict(config)}}


def petune_part(content: dict[str, Any]) -> dict[str, Any] | None:
    """Return petune's configuration in the content of `adapter_config.json`; None if PEFT alone wrote the file."""
    if "format" in content or content.get("peft_type") == OWN_TYPE:
        return content
    part: dict[str, Any] | None = (content.get("auto_mapping") or {}).get("petune")
    return part


def from_peft(peft_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what petune would have written for an adapter that PEFT wrote, without geometry and fingerprint.

    Args:
        peft_config: The content of its `adapter_config.json`.

    Raises:
        CheckpointError: PEFT refuses a file from this version of it. Where it computes something else than that version
            did, it warns (OFT from before 0.18).
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind = str(peft_config["peft_type"])
    config_class: Any = {str(k.value): c for k, c in PEFT_TYPE_TO_CONFIG_MAPPING.items()}.get(kind)
    known = {f.name: f for f in fields(config_class)} if config_class is not None else {}
    if config_class is not None:
        try:
            config_class.check_kwargs(**peft_config)
        except ValueError as error:
            raise CheckpointError(f"PEFT refuses this adapter: {error}") from error
    skipped = NOT_OPTIONS | WITHOUT_EFFECT.get(kind, set())
    options = {
        key: value
        for key, value in peft_config.items()
        if key in known and key not in skipped and value is not None and value != _default(known[key])
    }
    train_head = bool(options.pop("modules_to_save", None))
    return {
        "format": FORMAT,
        "tuner": "peft",
        "config": {"type": kind.lower(), **options},
        "train_head": train_head,
        "geometry": None,
        "fingerprint": None,
        "metadata": {},
    }


def _default(field: Field[Any]) -> Any:
    """Return the default of an option of PEFT's."""
    return field.default if field.default_factory is MISSING else field.default_factory()
