"""The adapter directory: a few megabytes that belong to one backbone and say so."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from petune.anatomy.forward import forget_caches
from petune.attach import Attachment, attach
from petune.errors import BackboneMismatch, CheckpointError
from petune.files import verify_directory, write_directory
from petune.registry import build_tuner, tuners
from petune.sites import Sites

FORMAT = 1
CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"


def save(attachment: Attachment, path: Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write `adapter_config.json`, `adapter_model.safetensors` and `README.md`, all or nothing.

    Args:
        attachment: What to save.
        path: The directory; what it held before is replaced.
        metadata: Further plain data for the config: class names, preprocessing, results.

    Raises:
        CheckpointError: It cannot be written.
    """
    origin = next((t for t in tuners() if t.name == attachment.name), None)
    config = {
        "format": FORMAT,
        "tuner": attachment.name,
        "distribution": origin.distribution if origin else None,
        "version": origin.version if origin else None,
        "config": attachment.tuner.config.model_dump(mode="json"),
        "train_head": bool(attachment.head),
        "geometry": geometry(attachment.sites),
        "fingerprint": fingerprint(attachment),
        "metadata": dict(metadata or {}),
    }
    tensors = {key: t.detach().to("cpu", copy=True).contiguous() for key, t in attachment.state().items()}
    files = {
        CONFIG_FILE: (json.dumps(config, indent=1) + "\n").encode(),
        TENSOR_FILE: save_tensors(tensors),
        "README.md": _card(attachment, config).encode(),
    }
    write_directory(path, files)


def load(model: nn.Module, path: str | Path, *, name: str | None = None) -> Attachment:
    """Attach what `save` wrote, on the same backbone.

    Args:
        model: The backbone the adapter was trained on, with a head of as many classes.
        path: The adapter directory.
        name: The attachment's name; the tuner's by default.

    Raises:
        BackboneMismatch: Another geometry, other weights, another number of classes; the model is as it was.
        CheckpointError: The directory is damaged, incomplete or from a newer petune.
        PluginError, UnknownName: The tuner's package is missing or broken.
    """
    place = Path(path)
    config, tensors = _read(place)
    attachment = attach(
        model,
        build_tuner(config["tuner"], **config["config"]),
        name=name or config["tuner"],
        train_head=config["train_head"],
    )
    try:
        _check(attachment, config, tensors, place)
    except CheckpointError:
        attachment.detach()
        raise
    with torch.no_grad():
        for key, target in attachment.state().items():
            target.copy_(tensors[key])
    forget_caches(model)
    return attachment


def fingerprint(attachment: Attachment) -> str:
    """SHA-256 over the frozen tensors of the backbone, parameters and buffers, by key: name, dtype, shape, bytes."""
    moving = {id(t) for t in (*attachment.state().values(), *attachment.tuned.values())}
    head = {id(p) for m in attachment.sites.head.modules for p in m.parameters()} if attachment.sites.head else set()
    holders = [m for m in attachment.model.modules() if hasattr(m, "is_petune_holder")]
    skipped = moving | head | {id(t) for h in holders for t in (*h.parameters(), *h.buffers())}
    digest = hashlib.sha256()
    named = {**dict(attachment.model.named_parameters()), **dict(attachment.model.named_buffers())}
    for key in sorted(named):
        tensor = named[key]
        if id(tensor) not in skipped:
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def geometry(sites: Sites) -> dict[str, Any]:
    """What of a backbone is named first where it differs."""
    return {
        "model": sites.model,
        "depth": len(sites.blocks),
        "width": sites.embed_dim,
        "grid": list(sites.grid_size) if sites.grid_size else None,
        "prefix_tokens": sites.num_prefix_tokens,
        "input": list(sites.input_size),
    }


def _read(place: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not (place / CONFIG_FILE).is_file():
        raise CheckpointError(f"{place} must be an adapter directory, but holds no {CONFIG_FILE}")
    verify_directory(place)
    try:
        config = json.loads((place / CONFIG_FILE).read_bytes())
        tensors = load_tensors((place / TENSOR_FILE).read_bytes())
        version = int(config["format"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{place} must be an adapter directory that petune wrote, but: {error}") from None
    if version > FORMAT:
        raise CheckpointError(f"{place} has format {version}, newer than {FORMAT}; upgrade: pip install -U petune")
    return config, tensors


def _check(att: Attachment, config: Mapping[str, Any], tensors: Mapping[str, Tensor], place: Path) -> None:
    here, there = geometry(att.sites), config["geometry"]
    differs = [f"{key} {there.get(key)} (this model: {here[key]})" for key in here if there.get(key) != here[key]]
    if differs:
        raise BackboneMismatch(f"{place} belongs to a backbone with another {', '.join(differs)}")
    state = att.state()
    shapes = [k for k in state if k in tensors and tensors[k].shape != state[k].shape]
    if shapes:
        what = "number of classes" if set(shapes) <= set(att.head) else "shape"
        key = shapes[0]
        raise BackboneMismatch(
            f"{place} was trained with another {what}: {key} is {tuple(tensors[key].shape)} there and "
            f"{tuple(state[key].shape)} in this model"
        )
    if set(state) != set(tensors):
        key = sorted(set(state) ^ set(tensors))[0]
        raise BackboneMismatch(f"{place} must hold exactly the tensors of {att.name}; {key} is on one side only")
    if fingerprint(att) != config["fingerprint"]:
        raise BackboneMismatch(
            f"{place} belongs to a backbone of the same shape with other weights; load the weights it was trained on "
            f"({config['metadata'].get('backbone', {}).get('weights', 'not recorded')})"
        )


def _card(attachment: Attachment, config: Mapping[str, Any]) -> str:
    options = ", ".join(f"{k}={v}" for k, v in config["config"].items()) or "none"
    return (
        f"# {attachment.name} adapter\n\nFor a {config['geometry']['model']} of depth {config['geometry']['depth']} "
        f"and width {config['geometry']['width']}. {attachment.counts}. Options: {options}.\n\n"
        "```\natt = petune.load(model, DIRECTORY)\n```\n"
    )
