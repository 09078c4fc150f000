"""Where a backbone's weights come from: the hub, a file, a pretraining run, the package itself. Never chance."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from petune.errors import CheckpointError, WeightsUnavailable
from petune.network import reachable

BUNDLED = Path(__file__).with_name("pretrained")
BACKBONE_FILE = "backbone.safetensors"
HUB_FILES = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")


@dataclass(frozen=True)
class Weights:
    """Tensors of a file and what the file says of itself.

    Attributes:
        tensors: By state_dict key, as stored.
        info: The `petune` entry of the file's metadata: backbone, preprocessing, results; empty for foreign files.
        source: The path, for the record.
    """

    tensors: Mapping[str, Tensor]
    info: Mapping[str, Any]
    source: str


@dataclass(frozen=True)
class HubFile:
    """Where a file lies, as timm's PretrainedCfg says it."""

    hf_hub_id: str
    hf_hub_filename: str | None = None
    url: str | None = None


def bundled(name: str) -> Path | None:
    """The weights file of that name that comes with petune, as `cifar100`."""
    path = BUNDLED / f"vit_nano_{name}.safetensors"
    return path if path.is_file() else None


def read_weights(path: Path) -> Weights:
    """Read a safetensors file, a pretraining run's directory, or a foreign `.pt` (tensors only).

    Raises:
        WeightsUnavailable: There is no such file.
        CheckpointError: The file is damaged or is no weights file.
    """
    file = path / BACKBONE_FILE if path.is_dir() else path
    if not file.is_file():
        what = f"{path} is a directory without {BACKBONE_FILE}" if path.is_dir() else f"there is no file {path}"
        raise WeightsUnavailable(
            f"--weights takes default, none, cifar100, a safetensors file or the directory of a finished "
            f"`petune pretrain`; {what}"
        )
    if file.suffix in {".pt", ".pth", ".bin"}:
        return Weights(_read_torch(file), {}, str(file))
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (not a mapping)
            info = json.loads(metadata.get("petune", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file} must be a safetensors file, but: {error}") from None
    return Weights(tensors, info, str(file))


def load_into(model: nn.Module, weights: Weights, head_keys: set[str]) -> None:
    """Load all but the head, which always starts anew.

    Args:
        model: Of the same architecture; position embeddings of another size are resampled by timm's own filter.
        head_keys: Keys of the classifier in `model`; they are left alone.

    Raises:
        CheckpointError: A key is missing, left over, or has another shape.
    """
    tensors = dict(weights.tensors)
    resample = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    here = model.state_dict()
    if resample is not None and any(k in here and here[k].shape != t.shape for k, t in tensors.items()):
        tensors = resample(tensors, model)
    wanted = {key for key in here if key not in head_keys}
    missing = sorted(wanted - set(tensors))
    heads = {key.split(".")[0] for key in head_keys} | {"head", "fc", "classifier"}
    extra = sorted(k for k in set(tensors) - wanted if k not in head_keys and k.split(".")[0] not in heads)
    shapes = [f"{k} {tuple(tensors[k].shape)} for {tuple(here[k].shape)}" for k in sorted(wanted & set(tensors))
              if tensors[k].shape != here[k].shape]  # fmt: skip
    if missing or extra or shapes:
        found = "; ".join(f"{len(v)} {w}: {', '.join(v[:3])}" for w, v in
                          (("missing", missing), ("left over", extra), ("of another shape", shapes)) if v)  # fmt: skip
        raise CheckpointError(f"{weights.source} must hold the weights of this backbone, but does not fit it ({found})")
    model.load_state_dict({key: tensors[key] for key in wanted}, strict=False)


def hub_overlay(model_name: str, config: Any) -> dict[str, Any]:
    """What to lay over timm's pretrained_cfg so that loading neither stalls nor fails late.

    A cached file is used as it is; else the host is asked first.

    Raises:
        WeightsUnavailable: timm has none, or they are not cached and the hub cannot be reached.
    """
    ways_out = f"--weights PATH for a file you have, or --weights none for random ones ({model_name} then starts anew)"
    if not (config.hf_hub_id or config.url):
        raise WeightsUnavailable(f"timm has no pretrained weights for {model_name}; give {ways_out}")
    cached = _cached(config)
    if cached is not None:
        return {"file": str(cached)}
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    url, file = (hub, f"{config.hf_hub_id}/{config.hf_hub_filename or HUB_FILES[0]}") if config.hf_hub_id else (
        config.url, config.url)  # fmt: skip
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"} and config.hf_hub_id
    if offline or not reachable(url):
        why = "HF_HUB_OFFLINE is set" if offline else f"{url} cannot be reached"
        from huggingface_hub.constants import HF_HUB_CACHE

        raise WeightsUnavailable(
            f"the pretrained weights of {model_name} must be cached or downloadable, but {file} is not in "
            f"{HF_HUB_CACHE} and {why}. Ways out: download it where there is a network and copy the cache; {ways_out}"
        )
    return {}


def _cached(config: Any) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from torch.hub import get_dir

    if config.hf_hub_id:
        for name in (config.hf_hub_filename,) if config.hf_hub_filename else HUB_FILES:
            found = try_to_load_from_cache(config.hf_hub_id, name)
            if isinstance(found, str):
                return Path(found)
        return None
    path = Path(get_dir()) / "checkpoints" / Path(config.url).name
    return path if path.is_file() else None


def _read_torch(file: Path) -> dict[str, Tensor]:
    import pickle

    import torch

    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{file} must hold tensors only (it is read without running code), but: {reason}"
        ) from None
    for key in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise CheckpointError(f"{file} must hold a state_dict (names to tensors)")
    return loaded
