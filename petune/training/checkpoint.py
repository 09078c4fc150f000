"""Checkpoints of a training: safetensors and JSON only, complete or absent; the newest valid one is used."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors, save as save_tensors
from torch import Tensor, nn

from petune.base.errors import CheckpointError, ConfigError
from petune.base.files import verify_directory, write_directory
from petune.training.config import TrainConfig
from petune.training.migrations import migrate_progress
from petune.training.optim import create_optimizer

NUM_KEPT = 2
FORMAT = 2
BUFFER = "buffer:"
"""Prefix of the keys of buffers."""


@dataclass(frozen=True)
class Checkpoint:
    """Everything that a bit-identical resume needs.

    Attributes:
        tensors: The trained tensors by state_dict key, and the model's buffers by `buffer:` and their key.
        best: The same tensors at the best epoch so far; empty if the last epoch is kept.
        optimizer: The optimizer's `state_dict()`.
        progress: The fields of `Progress`.
        average: The averages of the trained tensors; empty without `ema`.
    """

    tensors: Mapping[str, Tensor]
    best: Mapping[str, Tensor]
    optimizer: dict[str, Any]
    progress: dict[str, Any]
    average: Mapping[str, Tensor] = field(default_factory=dict)


def save_checkpoint(directory: Path, checkpoint: Checkpoint) -> Path:
    """Write `directory/step-N`. Remove all but the one before it, and any that claim a later step: they are damaged.

    Raises:
        CheckpointError: It cannot be written, or a tensor is not finite. The last good checkpoint stays.
    """
    tensors, other = _split_optimizer(checkpoint.optimizer)
    _check_finite(checkpoint.tensors)
    _check_finite(tensors)
    state = {"format": FORMAT, "progress": checkpoint.progress, "optimizer": other}
    try:
        state_json = json.dumps(state).encode()
    except TypeError as error:
        raise CheckpointError(f"the optimizer's state does not fit into a checkpoint: {error}") from None
    path = directory / f"step-{checkpoint.progress['step']:09d}"
    files = {"model": checkpoint.tensors, "best": checkpoint.best, "optimizer": tensors}
    if checkpoint.average:
        files["average"] = checkpoint.average
    contents = {f"{name}.safetensors": partial(_tensors_bytes, part) for name, part in files.items()}
    write_directory(path, {**contents, "state.json": state_json})
    older = [other_path for other_path in _paths(directory) if other_path.name < path.name]
    kept = {path, *older[-(NUM_KEPT - 1) :]}
    for other_path in _paths(directory):
        if other_path not in kept:
            _remove(other_path)
    return path


def newest_checkpoint(directory: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest valid checkpoint, or None, and what is wrong with newer ones.

    Raises:
        CheckpointError: The newest one is valid, but was written by a newer petune.
    """
    problems = []
    for path in reversed(_paths(directory)):
        try:
            verify_directory(path)
        except CheckpointError as error:
            problems.append(str(error))
        else:
            return _read(path), problems
    return None, problems


def check_optimizer(config: TrainConfig) -> None:
    """Check that the optimizer can take a step, and that a checkpoint can hold it, before an epoch is spent on it.

    Raises:
        ConfigError: It cannot.
    """
    parameters = {"matrix": nn.Parameter(torch.ones(4, 4)), "vector": nn.Parameter(torch.ones(4))}
    for p in parameters.values():
        p.grad = torch.ones_like(p)
    try:
        with torch.random.fork_rng(devices=[]):
            optimizer = create_optimizer(parameters, set(), config)
            optimizer.step()
        json.dumps(_split_optimizer(optimizer.state_dict())[1])
    except (RuntimeError, TypeError, AssertionError, ImportError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"optimizer {config.optimizer} is not supported: it must step from gradients alone, with a state of "
            f"tensors and numbers ({reason}). Use another optimizer"
        ) from None


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        # an attention mask is a buffer and may hold -inf
        bad = torch.isnan(tensor) if key.startswith(BUFFER) else ~torch.isfinite(tensor)
        if bool(bad.any()):
            raise CheckpointError(
                f"{key} contains NaN or infinity, so no checkpoint was written. Use a lower learning rate"
            )


def _read(path: Path) -> Checkpoint:
    state = json.loads((path / "state.json").read_bytes())
    if state["format"] > FORMAT:
        raise CheckpointError(
            f"{path} has format {state['format']}, which a newer petune wrote; this one reads up to {FORMAT}. "
            "Upgrade with: pip install -U petune"
        )
    model, best, optimizer = (
        load_tensors((path / f"{name}.safetensors").read_bytes()) for name in ("model", "best", "optimizer")
    )
    average_file = path / "average.safetensors"
    average = load_tensors(average_file.read_bytes()) if average_file.exists() else {}
    progress = migrate_progress(state["progress"], state["format"])
    return Checkpoint(model, best, _join_optimizer(optimizer, state["optimizer"]), progress, average)


def _paths(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob("step-*") if path.is_dir())


def _remove(path: Path) -> None:
    """Remove a checkpoint in one step for readers; if this is killed, the next start removes the renamed rest."""
    outdated = path.with_name(f".{path.name}-outdated")
    shutil.rmtree(outdated, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.rename(outdated)
    shutil.rmtree(outdated, ignore_errors=True)


def _tensors_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    # safetensors refuses tensors that share memory or are strided
    content: bytes = save_tensors({key: t.detach().to("cpu", copy=True).contiguous() for key, t in tensors.items()})
    return content


def _split_optimizer(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split into the tensors (of parameters, and of groups, such as Lamb's step) and what JSON can hold."""
    tensors, plain = {}, []
    groups = dict(enumerate(state["param_groups"]))
    for kind, parts in (("state", state["state"]), ("group", groups)):
        for index, entries in parts.items():
            for name, value in entries.items():
                if isinstance(value, Tensor):
                    tensors[f"{kind}.{index}.{name}"] = value
                else:
                    plain.append([kind, index, name, value])
    return tensors, {"plain": plain, "num_groups": len(groups)}


def _join_optimizer(tensors: Mapping[str, Tensor], other: dict[str, Any]) -> dict[str, Any]:
    """Undo `_split_optimizer`."""
    groups: dict[int, dict[str, Any]] = {index: {} for index in range(other["num_groups"])}
    parts: dict[str, dict[int, dict[str, Any]]] = {"state": {}, "group": groups}
    for key, tensor in tensors.items():
        kind, index, name = key.split(".", 2)
        parts[kind].setdefault(int(index), {})[name] = tensor
    for kind, index, name, value in other["plain"]:
        parts[kind].setdefault(int(index), {})[name] = value
    return {"state": parts["state"], "param_groups": [groups[index] for index in sorted(groups)]}
