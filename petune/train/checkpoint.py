"""Checkpoints of a run: safetensors and JSON only, complete or not there, the newest valid one is used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from petune.errors import CheckpointError
from petune.files import verify_directory, write_directory

KEPT = 2
FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """All that a bit-identical resume needs.

    Attributes:
        tensors: The trained tensors and the model's buffers, by state_dict key.
        best: The same tensors at the best epoch so far; empty where the last epoch is the result.
        optimizer: `state_dict()` of the optimizer.
        progress: Plain data: epoch, batch, step, what was measured so far.
    """

    tensors: Mapping[str, Tensor]
    best: Mapping[str, Tensor]
    optimizer: dict[str, Any]
    progress: dict[str, Any]


def save_checkpoint(directory: Path, checkpoint: Checkpoint) -> Path:
    """Write `directory/step-N` and remove all but the newest two.

    Raises:
        CheckpointError: It cannot be written, or a tensor is not finite (the last good one then stays).
    """
    tensors, settings = _split_optimizer(checkpoint.optimizer)
    for key, tensor in [*checkpoint.tensors.items(), *tensors.items()]:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"no checkpoint was written, since {key} holds NaN or infinity")
    state = {"format": FORMAT, "progress": checkpoint.progress, "optimizer": settings}
    path = directory / f"step-{checkpoint.progress['step']:09d}"
    write_directory(
        path,
        {
            "model.safetensors": save_tensors(_plain(checkpoint.tensors)),
            "best.safetensors": save_tensors(_plain(checkpoint.best)),
            "optimizer.safetensors": save_tensors(_plain(tensors)),
            "state.json": json.dumps(state).encode(),
        },
    )
    for old in _paths(directory)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def newest_checkpoint(directory: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest valid checkpoint, or None; and what was wrong with newer ones that were passed over."""
    problems = []
    for path in reversed(_paths(directory)):
        try:
            verify_directory(path)
            return _read(path), problems
        except CheckpointError as error:
            problems.append(str(error))
    return None, problems


def _read(path: Path) -> Checkpoint:
    state = json.loads((path / "state.json").read_bytes())
    if state["format"] > FORMAT:
        raise CheckpointError(f"{path} was written by a newer petune; upgrade with: pip install -U petune")
    model, best, tensors = (
        load_tensors((path / f"{part}.safetensors").read_bytes()) for part in ("model", "best", "optimizer")
    )
    return Checkpoint(model, best, _join_optimizer(tensors, state["optimizer"]), state["progress"])


def _paths(directory: Path) -> list[Path]:
    return sorted(p for p in directory.glob("step-*") if p.is_dir())


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # safetensors refuses tensors that share memory or are strided
    return {key: t.detach().to("cpu", copy=True).contiguous() for key, t in tensors.items()}


def _split_optimizer(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, numbers = {}, []
    for index, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value
            else:
                numbers.append([index, name, value])
    return tensors, {"numbers": numbers, "groups": state["param_groups"]}


def _join_optimizer(tensors: Mapping[str, Tensor], settings: dict[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = tensor
    for index, name, value in settings["numbers"]:
        state.setdefault(int(index), {})[name] = value
    return {"state": state, "param_groups": settings["groups"]}
