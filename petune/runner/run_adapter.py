"""Read the adapter of a finished run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petune.adapters.format import CONFIG_FILE, SavedAdapter, adapter_path, read_adapter
from petune.backbones.names import calls_user_code
from petune.base.config import expand_home
from petune.base.errors import CheckpointError
from petune.runner.directory_kind import explain_missing_adapter
from petune.runner.file_names import CONFIG_FILE as RUN_CONFIG
from petune.runner.migrations import read_config


@dataclass(frozen=True)
class InitialValues:
    """Seed and size that the random values of a backbone without weights depend on.

    Attributes:
        seed: Seed of the generator.
        num_classes: Outputs of the classifier that it was built with.
    """

    seed: int
    num_classes: int

    @classmethod
    def of(cls, saved: SavedAdapter) -> InitialValues:
        """Read them from the metadata of a run's adapter."""
        recorded, classes = saved.config["metadata"]["backbone"], saved.config["metadata"]["classes"]
        return cls(recorded.get("seed", 0), recorded.get("initial_classes") or len(classes))


def read_run_adapter(path: Path) -> SavedAdapter:
    """Read the adapter of a run, whose metadata describes its backbone and its classes.

    Args:
        path: A run directory, or the adapter directory in it.

    Raises:
        CheckpointError: There is no adapter, it is damaged, or its metadata lacks the description.
    """
    directory = find_adapter(path)
    saved = read_adapter(directory)
    metadata = saved.config["metadata"]
    if "averaged_from" in metadata and "backbone" in metadata and "classes" not in metadata:
        raise CheckpointError(
            f"{directory} has no classifier, because it was averaged with head='none'. Average with another head, "
            "train a classifier for it (petune run --from), or build the model and call petune.load(model, directory)"
        )
    if not {"backbone", "classes", "preprocess"} <= metadata.keys():
        raise CheckpointError(
            f"{directory} does not record its backbone, because it was not saved by `petune run`. Build the model "
            "yourself and call petune.load(model, directory)"
        )
    return saved


def find_adapter(path: Path) -> Path:
    """Return the adapter directory of a run directory, or the path itself if it is one.

    Raises:
        CheckpointError: It is neither; the message says what the directory is.
    """
    directory = adapter_path(expand_home(path))
    if not (directory / CONFIG_FILE).is_file():
        raise CheckpointError(explain_missing_adapter(directory))
    return directory


def run_dir_of(adapter: Path, metadata: Mapping[str, Any]) -> Path | None:
    """Return the directory of the run that saved an adapter; None for an average, a conversion, or a copy elsewhere.

    Args:
        adapter: The adapter directory.
        metadata: What the adapter records.
    """
    path = adapter.absolute()
    directory = path.parent
    is_made_of_others = {"averaged_from", "converted_from"} & metadata.keys()
    if is_made_of_others or adapter_path(directory) != path or not (directory / RUN_CONFIG).is_file():
        return None
    is_own = read_config(directory / RUN_CONFIG).get("dataset") == metadata.get("dataset")
    return directory if is_own else None


def user_code_of(saved: SavedAdapter) -> str:
    """Return the name of an adapter's backbone if building it runs code outside petune and the known libraries.

    That is a backbone named `package.module:factory`, which calls any function with any arguments. For others the
    result is empty.
    """
    backbone = saved.config["metadata"].get("backbone")
    recorded = backbone if isinstance(backbone, Mapping) else {}
    name, options = str(recorded.get("name", "")), recorded.get("options")
    trusts = isinstance(options, Mapping) and bool(options.get("trust_remote_code"))
    return name if calls_user_code(name) or trusts else ""
