"""Read what older versions of petune wrote into run directories.

There have been two changes of format so far, before 0.1.0: files and keys got the names that the field uses, and a
comparison keeps its own configuration in `config.yaml`; then `top1` and `top5` became `metrics` by name. Everything
is read through the functions here, in the words of today; files are renamed when a directory is opened to continue
in it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from petune.adapters.migrations import classification_metrics
from petune.base.yaml_values import read_yaml
from petune.runner.file_names import CONFIG_FILE, INPUTS_FILE, MANIFEST_FILE

OLD_FILES = {INPUTS_FILE: "began.json", MANIFEST_FILE: "pictures.json"}
OLD_COMPARE_CONFIG = "compare.yaml"
"""The configuration of a comparison; `config.yaml` held what its runs share."""
KEYS = {"train_per_class": "shots", "over": "search", "at_once": "parallel_trials"}
"""New keys of a configuration by old ones. Elsewhere the same words are names of classes, metrics or options."""
CONFIGS = {"config", "run"}
"""Keys of a configuration inside a table, or inside another configuration."""
VALUES = {
    ("variant", "seed"): "paddle_study",
    ("augment", "seed"): "paddle_study",
    ("backbone", "vit_seed"): "vit_paddle_study",
}
"""New values by key and old value."""
METRIC_NAMES = ("top1", "top5")
OLD_ROW_KEYS = {"top1", "top1_mean", "top1_std", "top5_mean", "top5_std", "val_top1_mean", "num_classes"}
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
    """Read `inputs.json`, `dataset_manifest.json` or `splits.json`; empty if there is none, or it cannot be read."""
    old = file.with_name(OLD_FILES.get(file.name, file.name))
    try:
        record = json.loads((file if file.exists() else old).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if file.name == INPUTS_FILE:  # the others hold names of classes and files, which are not petune's words
        record = updated(record)
    return record if isinstance(record, dict) else {}


def updated(data: Any, *, is_config: bool = True) -> Any:
    """Return plain data of an older version in the words of today; data of this version stays as it is.

    Args:
        data: A configuration, a table that has one, a result, or a part of them.
        is_config: Keys of a configuration may be in it.
    """
    if isinstance(data, dict):
        keys = KEYS if is_config else {}
        return {
            _method(keys.get(key, key)): _value(key, value, is_config=is_config and key in CONFIGS)
            for key, value in data.items()
        }
    if isinstance(data, list):
        return [updated(item, is_config=is_config) for item in data]
    return _method(data)


def updated_result(data: Any) -> Any:
    """Return `result.json` of an older version in the words of today."""
    data = updated(data)
    if not isinstance(data, dict) or not {"top1", "top5"} <= data.keys():
        return data
    val = data.pop("val_top1", None)
    test = {name: data.pop(name) for name in METRIC_NAMES}
    return {
        **data,
        "task": "classification",
        "metrics": test,
        "val_metrics": None if val is None else {"top1": val},
        "metric_info": classification_metrics(data.get("num_classes")),
    }


def updated_comparison(data: Any) -> Any:
    """Return `compare.json` of an older version in the words of today."""
    data = updated(data)
    rows = data.get("rows") if isinstance(data, dict) else None
    if not isinstance(rows, list) or "metric_info" in data:
        return data
    counts = [row["num_classes"] for row in rows if isinstance(row, dict) and row.get("num_classes")]
    metrics = classification_metrics(min(counts, default=None) if len(counts) == len(rows) else None)
    return {**data, "task": "classification", "metric_info": metrics, "rows": [_row(row) for row in rows]}


def updated_fit(data: Any) -> Any:
    """Return `trial.json` of an older version in the words of today."""
    data = _trial(updated(data))
    if not isinstance(data, dict) or "metric_info" in data:
        return data
    return {**data, "task": "classification", "metric_info": classification_metrics(None)}


def updated_sweep(data: Any) -> Any:
    """Return `sweep.json` of an older version in the words of today."""
    data = updated(data)
    if not isinstance(data, dict) or "metric_info" in data or not isinstance(data.get("rows"), list):
        return data
    result = updated_result(data.get("result"))
    metrics = result["metric_info"] if isinstance(result, dict) else classification_metrics(None)
    rows = [_trial(row) for row in data["rows"]]
    return {**data, "rows": rows, "result": result, "task": "classification", "metric_info": metrics}


def _trial(row: Any) -> Any:
    if not isinstance(row, dict) or "val_top1" not in row:
        return row
    values = {name: row.pop(f"val_{name}", None) for name in METRIC_NAMES}
    val = {name: value for name, value in values.items() if value is not None}
    return {**row, "val_metrics": val or None}


def _row(row: Any) -> Any:
    """Return a row of `compare.json`: a value per seed, mean and deviation, each by the metric's name."""
    if not isinstance(row, dict):
        return row
    others = {key: value for key, value in row.items() if key not in OLD_ROW_KEYS}
    by_field = {"metrics": "{}", "mean": "{}_mean", "std": "{}_std", "val_mean": "val_{}_mean"}
    values = {
        field: {name: row[key] for name in METRIC_NAMES if row.get(key := form.format(name)) not in (None, [])}
        for field, form in by_field.items()
    }
    return {**others, **values}


def _value(key: str, value: Any, *, is_config: bool) -> Any:
    if key == "provenance":  # a record of what happened then
        return value
    if isinstance(value, list):
        return [_value(key, item, is_config=is_config) for item in value]
    if isinstance(value, str) and (key, value) in VALUES:
        return VALUES[key, value]
    return updated(value, is_config=is_config)


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
