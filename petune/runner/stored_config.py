"""The `config.yaml` of a run directory: written when it starts, and compared whenever it is continued."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from petune.base.config import Config
from petune.base.errors import ConfigError, UsageError
from petune.base.files import replace_file
from petune.runner.file_names import CONFIG_FILE, RESULT_FILE
from petune.runner.migrations import read_config
from petune.training.run_files import METRICS_FILE

MAY_CHANGE = {"output", "resume", "cache_gb", "train.eval_batch_size"}
"""Keys that do not affect a result: the directory, the size of the cache, and the evaluation batch size."""


def write_config(run_dir: Path, config: Config, command: str) -> None:
    """Write the configuration of `petune COMMAND`, without what belongs to this one call.

    Raises:
        CheckpointError: It cannot be written.
    """
    fields = type(config).model_fields
    plain = config.model_copy(update={key: fields[key].default for key in MAY_CHANGE & fields.keys()})
    text = f"# petune {command} --config {CONFIG_FILE}\n{plain.to_yaml()}"
    replace_file(run_dir / CONFIG_FILE, text.encode())


def check_config(run_dir: Path, config: Config, may_change: Collection[str] = ()) -> None:
    """Check that what was trained in a directory, if anything, has the same configuration.

    Args:
        run_dir: May be missing.
        config: To continue with.
        may_change: Top-level keys that need not be the same.

    Raises:
        UsageError: A value differs; all of them are in the message.
    """
    if (run_dir / CONFIG_FILE).exists() and has_trained(run_dir):
        refuse_changes(run_dir, config, may_change)


def refuse_changes(run_dir: Path, config: Config, may_change: Collection[str] = ()) -> None:
    """Check that a directory has the same configuration, whether it has trained or not; see `check_config`."""
    changes = changed_values(run_dir, config, may_change)
    if changes:
        raise UsageError(
            f"{run_dir} was started with a different configuration. These values changed:\n  - "
            + "\n  - ".join(changes)
            + "\nUse the same values to continue, or another output",
            cli_hint="Name a new directory with --output",
        )


def changed_values(run_dir: Path, config: Config, may_change: Collection[str] = ()) -> list[str]:
    """List the values in which the stored configuration differs from `config`: `seed: 0 before, 1 now`."""
    before = flatten(_with_defaults(read_config(run_dir / CONFIG_FILE), type(config)))
    now = flatten(config.model_dump(mode="json"))
    keys = [key for key in sorted({*before, *now}) if not _is_free(key, may_change)]
    return [f"{k}: {before.get(k)!r} before, {now.get(k)!r} now" for k in keys if before.get(k) != now.get(k)]


def has_trained(run_dir: Path) -> bool:
    """Return whether a directory holds anything that took time: results, metrics, or directories of runs."""
    return any(path.is_dir() or path.name in (RESULT_FILE, METRICS_FILE) for path in run_dir.iterdir())


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Join nested keys with dots: `{"train": {"lr": 1}}` becomes `{"train.lr": 1}`. An empty mapping is a value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _is_free(key: str, may_change: Collection[str]) -> bool:
    return key.removeprefix("run.") in MAY_CHANGE or key.partition(".")[0] in may_change


def _with_defaults(values: dict[str, Any], kind: type[Config]) -> dict[str, Any]:
    """Add the defaults of options that did not exist when the values were written."""
    try:
        return kind.build(values).model_dump(mode="json")
    except ConfigError:
        return values
