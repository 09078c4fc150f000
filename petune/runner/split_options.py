"""The options of a run that choose its val and test images; its adapter records them, because it may be copied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from petune.adapters.format import OLD_SPLIT_OPTIONS, SPLIT_OPTIONS
from petune.runner.file_names import CONFIG_FILE
from petune.runner.migrations import read_config
from petune.runner.run_config import RunConfig

TEST_KEYS = ("dataset", "folds", "fold", "on_broken", "channels")
SPLIT_KEYS = (*TEST_KEYS, "val_fraction")
"""The seed of a run chooses neither val nor test."""


def split_options(config: RunConfig) -> dict[str, Any]:
    """Return the options of a run that choose its val and test images."""
    return {key: getattr(config, key) for key in SPLIT_KEYS}


def read_split_options(metadata: Mapping[str, Any], run_dir: Path | None) -> dict[str, Any] | None:
    """Return the options that chose the val and test images of an adapter; None if they are not known.

    Args:
        metadata: The adapter's.
        run_dir: The directory of its run, whose configuration counts; None if it is not there.
    """
    if run_dir is not None:
        config = read_config(run_dir / CONFIG_FILE)
        return {key: config.get(key, RunConfig.model_fields[key].default) for key in SPLIT_KEYS}
    recorded = metadata.get(SPLIT_OPTIONS, metadata.get(OLD_SPLIT_OPTIONS))
    return dict(recorded) if isinstance(recorded, Mapping) else None


def shared_options(each: Sequence[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """Return the options that several adapters have in common, as an average records; None if one's are not known."""
    known = [options for options in each if options is not None]
    if len(known) < len(each):
        return None
    first = known[0]
    return {key: first[key] for key in first if all(key in o and o[key] == first[key] for o in known)}
