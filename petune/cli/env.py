"""`petune env`: versions, device and directories, as a bug report needs them."""

from __future__ import annotations

import os
from typing import Any

from petune.cli.options import Json
from petune.cli.terminal import print_facts, print_json


def env(json: Json = False) -> None:
    """Show versions, device, directories and precision.

    Precision is the number format that is faster on this device, measured now.
    """
    data = environment()
    if json:
        print_json(data)
        return
    versions = [(name, version or "not installed") for name, version in data.pop("versions").items()]
    print_facts([*versions, *((key.replace("_", " "), _describe(value)) for key, value in data.items())])


def environment() -> dict[str, Any]:
    """Return what `petune env` shows, as plain data."""
    from huggingface_hub.constants import HF_HUB_CACHE

    from petune.data.cache import cache_dir
    from petune.data.lookup import find_dataset
    from petune.data.registry import list_datasets
    from petune.runner.provenance import provenance
    from petune.training.precision import choose_device, choose_precision

    device = choose_device("auto")
    names = [record.name for record in list_datasets() if record.is_own and not record.argument]
    known = provenance(device)
    return {
        "versions": known["versions"],
        "python": known["python"],
        "platform": known["platform"],
        "git": known["git"],
        "device": f"{device.type}: {known['device']}",
        "threads": known["threads"],
        "precision": choose_precision("auto", device),
        "cache_dir": str(cache_dir()),
        "data_dir": os.environ.get("PETUNE_DATA"),
        "hub_cache_dir": HF_HUB_CACHE,
        "datasets": {name: find_dataset(name) for name in names},
    }


def _describe(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_describe(item)}" for key, item in value.items())
    return "-" if value is None else str(value)
