"""The adapter directory: a few megabytes that belong to one backbone and say so."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors, save as save_tensors
from torch import Tensor, nn

from petune.adapters.card import model_card
from petune.adapters.fingerprint import fingerprint, head_fingerprint
from petune.adapters.reference_logits import behaviour, max_abs_diff
from petune.base.arguments import PathText, check_arguments
from petune.base.config import expand_home
from petune.base.errors import BackboneMismatch, CheckpointError, PetuneError, PluginError, UsageError
from petune.base.files import MANIFEST, verify_directory, write_directory
from petune.injector.attach import attach, label_of
from petune.injector.attachment import Attachment
from petune.injector.registry import build_tuner, list_tuners, load_tuner
from petune.injector.trainable import trainable_state_of
from petune.injector.tuner import Tuner
from petune.sites.find import find_sites
from petune.sites.forward import forget_caches
from petune.sites.site import Sites

FORMAT = 1
KEYS = {"tuner", "config", "train_head", "geometry", "fingerprint", "metadata"}
CONFIG_FILE, TENSOR_FILE, CARD_FILE = "adapter_config.json", "adapter_model.safetensors", "README.md"


def save(attachment: Attachment, path: Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write `adapter_config.json`, `adapter_model.safetensors` and `README.md`, all or nothing.

    Args:
        attachment: What to save.
        path: The directory; an adapter that is there is replaced.
        metadata: Further plain data for the config: class names, preprocessing, results.

    Raises:
        UsageError: `path` is something else: a file, or a directory that holds more than an adapter.
        CheckpointError: It cannot be written.
    """
    refuse_foreign(path)
    config = describe(attachment) | {"behaviour": behaviour(attachment), "metadata": dict(metadata or {})}
    foreign, _ = attachment.tuner.to_external(attachment.state()) or (None, None)
    # PEFT reads the same two files. Its own methods have its keys at the top, petune's in the one entry that is
    # free-form there; for a method of petune's all of them are at the top (see petune.peft_method)
    written = {"peft_type": "PETUNE"} | config if foreign is None else foreign | {"auto_mapping": {"petune": config}}
    tensors = {key: t.detach().to("cpu", copy=True).contiguous() for key, t in file_tensors(attachment).items()}
    files = {
        CONFIG_FILE: (json.dumps(written, indent=1) + "\n").encode(),
        TENSOR_FILE: save_tensors(tensors),
        CARD_FILE: model_card(config, attachment.counts, with_peft=foreign is not None).encode(),
    }
    write_directory(path, files)


def refuse_foreign(target: Path) -> None:
    """Only an empty directory is replaced, or an adapter directory that holds nothing else.

    Raises:
        UsageError: There is something else.
    """
    if not target.exists() and not target.is_symlink():
        return
    names = {file.name for file in target.iterdir()} if target.is_dir() and not target.is_symlink() else {""}
    if names and (CONFIG_FILE not in names or names - {CONFIG_FILE, TENSOR_FILE, CARD_FILE, MANIFEST}):
        raise UsageError(f"{target} exists and is no adapter directory; it is left alone. Name another place")


def describe(attachment: Attachment) -> dict[str, Any]:
    """What an adapter's config says of it: the method, and the backbone it belongs to."""
    method = attachment.tuner.method or attachment.name
    origin = next((t for t in list_tuners() if t.name == method), None)
    return {
        "format": FORMAT,
        "tuner": method,
        "distribution": origin.distribution if origin else None,
        "version": origin.version if origin else None,
        "config": attachment.tuner.config.plain(),
        "train_head": bool(attachment.head),
        "geometry": geometry(attachment.sites),
        "fingerprint": attachment.fingerprint or fingerprint(attachment),
        "head_fingerprint": head_fingerprint(attachment),
    }


def load(
    model: nn.Module,
    path: str | Path,
    *,
    name: str | None = None,
    tuner: Tuner[Any] | None = None,
    sites: Sites | None = None,
) -> Attachment:
    """Attach what `save` wrote, on the same backbone.

    Args:
        model: The backbone the adapter was trained on, with a head of as many classes.
        path: The adapter directory.
        name: The attachment's name; the tuner's by default.
        tuner: The method, for one that is not registered; its options must be those of the file.
        sites: Of the model; found now if None, for images of the size that the file says.

    Raises:
        BackboneMismatch: Another geometry, other weights, another number of classes; the model is as it was.
        CheckpointError: The directory is damaged, incomplete or from a newer petune; or `tuner` has other options.
        PluginError: The tuner's package is missing or broken.
    """
    kinds = {"name": (name, str | None), "tuner": (tuner, Tuner | None), "sites": (sites, Sites | None)}
    check_arguments("petune.load", model=(model, nn.Module), path=(path, PathText), **kinds)
    return attach_saved(model, read_adapter(expand_home(path)), name=name, tuner=tuner, sites=sites)


@dataclass(frozen=True)
class Saved:
    """What an adapter directory holds: its place, petune's config, the tensors by the file's keys."""

    place: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]


def attach_saved(
    model: nn.Module,
    saved: Saved,
    *,
    name: str | None = None,
    tuner: Tuner[Any] | None = None,
    sites: Sites | None = None,
) -> Attachment:
    """Attach what was read already; see `load`."""
    place, config, tensors = saved.place, saved.config, saved.tensors
    if tuner is None and config["tuner"].partition(":")[0] not in {t.name for t in list_tuners()}:
        raise PluginError(
            f"{place} needs the method {config['tuner']!r}, which is not installed here; it was saved with "
            f"{config.get('distribution') or 'a package that is not recorded'} {config.get('version') or ''}".rstrip()
            + "; install that package"
        )
    if tuner is not None:
        _check_options(tuner, config, place)
    attachment = attach(
        model,
        tuner or build_tuner(config["tuner"], **config["config"]),
        name=name or config["tuner"],
        train_head=config["train_head"],
        sites=sites or _sites_as_saved(model, config["geometry"]),
    )
    try:
        check_fits(attachment, config, tensors, place)
        fill(attachment, config, tensors, place)
    except BaseException:
        attachment.detach()
        raise
    return attachment


def _sites_as_saved(model: nn.Module, saved: Mapping[str, Any] | None) -> Sites | None:
    """The sites for images of the size that the adapter was made for, where they are as in its file."""
    if saved is None or trainable_state_of(model) is not None:
        return None
    with contextlib.suppress(PetuneError, KeyError, TypeError):  # which is then said by who looks without the file
        sites = find_sites(model, tuple(saved["input"]))
        return sites if geometry(sites) == saved else None
    return None


def _check_options(tuner: Tuner[Any], config: Mapping[str, Any], place: Path) -> None:
    here, there = tuner.config.plain(), config["config"]
    differs = [f"{key} {value!r} (here {here.get(key)!r})" for key, value in there.items() if here.get(key) != value]
    if differs:
        raise CheckpointError(
            f"{place} must be loaded with the options it was saved with, but the tuner has another "
            f"{', '.join(differs)}; build {type(tuner).__name__} with those of the file"
        )


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


def file_tensors(attachment: Attachment) -> dict[str, Tensor]:
    """The tensors that a file fills, by the file's keys: adapters are called by their method, whatever their name."""
    packed = attachment.tuner.to_external(attachment.state())
    if packed is not None:
        return packed[1]
    method = label_of(attachment.tuner.method or attachment.name)
    here, there = f"petune_{attachment.edit_log.name}", f"petune_{method}"
    return {".".join(_renamed(part, here, there) for part in k.split(".")): t for k, t in attachment.state().items()}


def _renamed(part: str, here: str, there: str) -> str:
    return there + part.removeprefix(here) if part.startswith(here) else part


def adapter_place(path: Path) -> Path:
    """The adapter directory of a run directory; any other path as it is."""
    return path / "adapter" if (path / "adapter").is_dir() else path


def read_adapter(place: Path) -> Saved:
    """Config and tensors of an adapter directory, petune's or PEFT's.

    Raises:
        CheckpointError: See `load`.
    """
    if not (place / CONFIG_FILE).is_file():
        raise CheckpointError(f"no adapter in {place}: {CONFIG_FILE} is missing")
    try:
        config = json.loads((place / CONFIG_FILE).read_bytes())
        whole = "format" in config or config.get("peft_type") == "PETUNE"
        own = config if whole else (config.get("auto_mapping") or {}).get("petune")
        if own is not None or "peft_type" not in config:
            verify_directory(place, except_for={CARD_FILE})  # a model card is there to be edited
        tensors = load_tensors((place / TENSOR_FILE).read_bytes())
        config = _of_peft(config) if own is None else own
        version = int(config["format"])
        missing = [] if version > FORMAT else sorted(KEYS - set(config))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"{place} must be an adapter directory that petune wrote, but: {error}") from None
    if version > FORMAT:
        raise CheckpointError(f"{place} has format {version}, newer than {FORMAT}; upgrade: pip install -U petune")
    if missing:
        raise CheckpointError(
            f"{place / CONFIG_FILE} must have {', '.join(sorted(KEYS))}, but lacks {', '.join(missing)}"
        )
    return Saved(place, config, tensors)


def _of_peft(config: dict[str, Any]) -> dict[str, Any]:
    """What petune would have written for an adapter that PEFT wrote: without geometry and fingerprint."""
    reader: Any = load_tuner("peft")
    unpacked: dict[str, Any] = reader.from_external(config)
    return {"format": FORMAT, "metadata": {}, "geometry": None, "fingerprint": None, **unpacked}


def check_fits(att: Attachment, config: Mapping[str, Any], tensors: Mapping[str, Tensor], place: Path) -> None:
    """That a file's tensors belong on this attachment's backbone.

    Args:
        config: What the file says of itself.
        tensors: By the file's keys.
        place: What the message calls the file.

    Raises:
        BackboneMismatch: See `load`.
    """
    here, there = geometry(att.sites), config["geometry"]
    there = here if there is None else there
    differs = [f"{key} {there.get(key)} (this model: {here[key]})" for key in here if there.get(key) != here[key]]
    if differs:
        raise BackboneMismatch(f"{place} belongs to a backbone with another {', '.join(differs)}")
    state = file_tensors(att)
    shapes = [k for k in state if k in tensors and tensors[k].shape != state[k].shape]
    if shapes:
        what = "number of classes" if all(key.endswith(tuple(att.head) or "-") for key in shapes) else "shape"
        key = shapes[0]
        raise BackboneMismatch(
            f"{place} was trained with another {what}: {key} is {tuple(tensors[key].shape)} there and "
            f"{tuple(state[key].shape)} in this model"
        )
    if set(state) != set(tensors):
        key = sorted(set(state) ^ set(tensors))[0]
        raise BackboneMismatch(f"{place} must hold exactly the tensors of {att.name}; {key} is on one side only")
    described = config["metadata"].get("backbone")
    weights = described.get("weights", "not recorded") if isinstance(described, Mapping) else "not recorded"
    if config["fingerprint"] is not None and fingerprint(att) != config["fingerprint"]:
        ledger = trainable_state_of(att.model)
        alone = ledger is None or len(ledger.claims) == 1
        stacked = "" if alone else ", and what is stacked in the order in which it was attached"
        raise BackboneMismatch(
            f"{place} belongs to a backbone of the same shape with other weights; load the weights it was trained on "
            f"({weights}){stacked}"
        )
    if config.get("head_fingerprint") not in {None, head_fingerprint(att)}:
        raise BackboneMismatch(
            f"{place} was trained under a classifier that stays as it is (train_head=False), not under this model's; "
            f"load the one it was trained under ({weights})"
        )


def fill(att: Attachment, config: Mapping[str, Any], tensors: Mapping[str, Tensor], place: Path) -> None:
    """Copy a file's tensors in, and see that the model then computes what it did when they were saved.

    Args:
        config, tensors, place: As `check_fits` has found them right.

    Raises:
        BackboneMismatch: It does not.
        CheckpointError: What the file says of that cannot be read.
    """
    with torch.no_grad():
        for key, target in file_tensors(att).items():
            target.copy_(tensors[key])
    forget_caches(att.model)
    saved = config.get("behaviour")
    if saved is None:
        return
    try:
        moved = max_abs_diff(att, saved)
    except CheckpointError as error:
        raise CheckpointError(f"{place / CONFIG_FILE}: {error}") from None
    if moved:
        largest = max(map(abs, saved["logits"]))
        raise BackboneMismatch(
            f"{place} belongs to a backbone with the same tensors that computes something else: logits of a test "
            f"image, up to {largest:.3g} when it was saved, are off by {moved:.3g} here. Build the backbone as for "
            "training (number of heads, activation, normalisation, pooling)"
            f"{_other_version(config, att.tuner.method)}"
        )


def _other_version(config: Mapping[str, Any], method: str | None) -> str:
    here = next((t for t in list_tuners() if t.name == method), None)
    there = f"{config.get('distribution')} {config.get('version')}"
    if here is None or f"{here.distribution} {here.version}" == there:
        return ""
    return f"; or the method changed: it was saved with {there}, here is {here.distribution} {here.version}"
