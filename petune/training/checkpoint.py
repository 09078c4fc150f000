"""Checkpoints of a run: safetensors and JSON only, complete or not there, the newest valid one is used."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors, save as save_tensors
from torch import Tensor, nn

from petune.base.errors import CheckpointError, ConfigError
from petune.base.files import verify_directory, write_directory
from petune.training.config import TrainConfig
from petune.training.optim import create_optimizer

KEPT = 2
FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """All that a bit-identical resume needs.

    Attributes:
        tensors: The trained tensors by state_dict key, and the model's buffers by `buffer:` and their key.
        best: The same tensors at the best epoch so far; empty where the last epoch is the result.
        optimizer: `state_dict()` of the optimizer.
        progress: Plain data: epoch, batch, step, what was measured so far.
    """

    tensors: Mapping[str, Tensor]
    best: Mapping[str, Tensor]
    optimizer: dict[str, Any]
    progress: dict[str, Any]


def save_checkpoint(directory: Path, checkpoint: Checkpoint) -> Path:
    """Write `directory/step-N` and remove all but the one before, and what claims to come after (it is damaged).

    Raises:
        CheckpointError: It cannot be written, or a tensor is not finite (the last good one then stays).
    """
    tensors, settings = _split_optimizer(checkpoint.optimizer)
    for key, tensor in [*checkpoint.tensors.items(), *tensors.items()]:
        if tensor.is_floating_point() and not bool(_sound(key)(tensor).all()):
            raise CheckpointError(
                f"a checkpoint must be finite, but {key} holds NaN or infinity; none was written, lower --lr"
            )
    state = _json({"format": FORMAT, "progress": checkpoint.progress, "optimizer": settings})
    path = directory / f"step-{checkpoint.progress['step']:09d}"
    write_directory(
        path,
        {
            "model.safetensors": save_tensors(_plain(checkpoint.tensors)),
            "best.safetensors": save_tensors(_plain(checkpoint.best)),
            "optimizer.safetensors": save_tensors(_plain(tensors)),
            "state.json": state,
        },
    )
    older = [other for other in _paths(directory) if other.name < path.name]
    for other in _paths(directory):
        if other != path and other not in older[-(KEPT - 1) :]:
            _remove(other)
    return path


def _remove(path: Path) -> None:
    """Take it away in one step for those who look; a kill leaves a stump, which the next start clears away."""
    stump = path.with_name(f".{path.name}-outdated")
    shutil.rmtree(stump, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.rename(stump)
    shutil.rmtree(stump, ignore_errors=True)


def newest_checkpoint(directory: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest valid checkpoint, or None; and what was wrong with newer ones that were passed over.

    Raises:
        CheckpointError: The newest one is whole, but was written by a newer petune.
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


def check_optimizer(train: TrainConfig) -> None:
    """Hold that the optimizer can do a step, and that a checkpoint can keep it, before an epoch is spent on it.

    Raises:
        ConfigError: It cannot.
    """
    parameters = {"matrix": nn.Parameter(torch.ones(4, 4)), "vector": nn.Parameter(torch.ones(4))}
    for p in parameters.values():
        p.grad = torch.ones_like(p)
    try:
        with torch.random.fork_rng(devices=[]):
            optimizer = create_optimizer(parameters, set(), train)
            optimizer.step()
        _json(_split_optimizer(optimizer.state_dict())[1])
    except (RuntimeError, CheckpointError, AssertionError, ImportError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].removesuffix("; use another --optimizer")
        raise ConfigError(
            f"optimizer must do its step from gradients alone and keep tensors and numbers, but with "
            f"{train.optimizer}: {reason}; use another --optimizer"
        ) from None


def _json(state: dict[str, Any]) -> bytes:
    try:
        return json.dumps(state).encode()
    except TypeError as error:
        raise CheckpointError(
            f"an optimizer's state must be tensors and numbers, but: {error}; use another --optimizer"
        ) from None


def _sound(key: str) -> Callable[[Tensor], Tensor]:
    # an attention mask is a buffer and may hold -inf for good
    return (lambda t: ~torch.isnan(t)) if key.startswith("buffer:") else torch.isfinite


def _read(path: Path) -> Checkpoint:
    state = json.loads((path / "state.json").read_bytes())
    if state["format"] > FORMAT:
        raise CheckpointError(
            f"{path} must have format {FORMAT} or older, but has {state['format']}, that of a newer petune; "
            "upgrade with: pip install -U petune"
        )
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
    """The tensors of the state (of parameters, and of groups, as Lamb's step), and what JSON can hold."""
    tensors, plain = {}, []
    for kind, parts in _parts(state).items():
        for index, entries in parts.items():
            for name, value in entries.items():
                if isinstance(value, Tensor):
                    tensors[f"{kind}.{index}.{name}"] = value
                else:
                    plain.append([kind, index, name, value])
    return tensors, {"plain": plain, "num_groups": len(state["param_groups"])}


def _join_optimizer(tensors: Mapping[str, Tensor], settings: dict[str, Any]) -> dict[str, Any]:
    parts: dict[str, dict[int, dict[str, Any]]] = {
        "state": {},
        "group": {index: {} for index in range(settings["num_groups"])},
    }
    for key, tensor in tensors.items():
        kind, index, name = key.split(".", 2)
        parts[kind].setdefault(int(index), {})[name] = tensor
    for kind, index, name, value in settings["plain"]:
        parts[kind].setdefault(int(index), {})[name] = value
    return {"state": parts["state"], "param_groups": [parts["group"][i] for i in sorted(parts["group"])]}


def _parts(state: dict[str, Any]) -> dict[str, dict[int, dict[str, Any]]]:
    return {"state": state["state"], "group": dict(enumerate(state["param_groups"]))}
