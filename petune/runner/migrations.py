"""Read what older versions of petune wrote into run directories.

There has been one change of format so far, before 0.1.0: files and keys got the names that the field uses, and a
comparison keeps its own configuration in `config.yaml`. Everything is read through the functions here, in the words of
today; files are renamed when a directory is opened to continue in it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from petune.base.yaml_values import read_yaml
from petune.runner.file_names import CONFIG_FILE, INPUTS_FILE, MANIFEST_FILE

OLD_FILES = {INPUTS_FILE: "began.json", MANIFEST_FILE: "pictures.json"}
OLD_COMPARE_CONFIG = "compare.yaml"
"""The configuration of a comparison; `config.yaml` held what its runs share."""
KEYS = {"train_per_class": "shots", "over": "search", "at_once": "parallel_trials"}
"""New keys by old ones."""
VALUES = {
    ("variant", "seed"): "paddle_study",
    ("augment", "seed"): "paddle_study",
    ("backbone", "vit_seed"): "vit_paddle_study",
}
"""New values by key and old value."""
OLD_VARIANT, VARIANT = "variant=seed", "variant=paddle_study"


def read_config(file: Path) -> dict[str, Any]:
    """Read a YAML configuration, in the words of today.

    Raises:
        ConfigError: See `petune.base.config.read_yaml`.
    """
    old = file.with_name(OLD_COMPARE_CONFIG)
    values = read_yaml(old if file.name == CONFIG_FILE and old.is_file() else file)
    return {str(key): value for key, value in updated(values).items()}


def read_record(file: Path) -> dict[str, Any]:
    """Read `inputs.json` or `dataset_manifest.json`; empty if there is none, or it cannot be read."""
    old = file.with_name(OLD_FILES.get(file.name, file.name))
    try:
        record = updated(json.loads((file if file.exists() else old).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def updated(data: Any) -> Any:
    """Return plain data of an older version in the words of today; data of this version stays as it is."""
    if isinstance(data, dict):
        return {_method(KEYS.get(key, key)): _value(key, value) for key, value in data.items()}
    if isinstance(data, list):
        return [updated(item) for item in data]
    return _method(data)


def _value(key: str, value: Any) -> Any:
    if key == "provenance":  # a record of what happened then
        return value
    if isinstance(value, list):
        return [_value(key, item) for item in value]
    return VALUES[key, value] if isinstance(value, str) and (key, value) in VALUES else updated(value)


def _method(text: Any) -> Any:
    """Update a method with its options: `adaptformer:variant=seed,bottleneck=2`."""
    is_method = isinstance(text, str) and text.startswith("adaptformer:")
    return text.replace(OLD_VARIANT, VARIANT) if is_method else text


def migrate_run_dir(run_dir: Path) -> None:
    """Give the files of an older version the names of today. The directory must be locked."""
    for name, old in {**OLD_FILES, CONFIG_FILE: OLD_COMPARE_CONFIG}.items():
        if (run_dir / old).exists():
            (run_dir / old).replace(run_dir / name)
    for old_run in run_dir.glob(f"*_{OLD_VARIANT}*"):
        old_run.rename(old_run.with_name(old_run.name.replace(OLD_VARIANT, VARIANT)))
