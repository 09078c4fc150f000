"""Where a backbone's weights come from: the hub, a file, a pretraining run, the package itself. Never chance."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from petune.base.config import expand_home
from petune.base.errors import CheckpointError, WeightsUnavailable

BUNDLED = Path(__file__).with_name("pretrained")
BACKBONE_FILE = "backbone.safetensors"


@dataclass(frozen=True)
class Weights:
    """Tensors of a file and what the file says of itself.

    Attributes:
        tensors: By state_dict key, as stored.
        info: The `petune` entry of the file's metadata: backbone, preprocessing, results; empty for foreign files.
        source: Where they come from, for the record and for messages.
    """

    tensors: Mapping[str, Tensor]
    info: Mapping[str, Any]
    source: str

    @property
    def adapters(self) -> dict[str, Tensor]:
        """What belongs to adapters that were there in pretraining, by the keys that they have in the model."""
        said = self.info.get("adapters")
        return {k: t for k, t in self.tensors.items() if k in said} if isinstance(said, list) else {}


def load_adapters(model: nn.Module, weights: Weights, method: str) -> None:
    """Start a method's adapters where those of the pretraining ended.

    Raises:
        CheckpointError: The method has other adapters. The backbone was trained with them and is not itself without.
    """
    here = model.state_dict()
    wrong = sorted(k for k, t in weights.adapters.items() if k not in here or here[k].shape != t.shape)
    if wrong:
        raise CheckpointError(
            f"{weights.source} was pretrained with the adapters of {weights.info.get('method')}, so that the method "
            f"must have the same, but {method} has none that fit {wrong[0]}"
        )
    model.load_state_dict(weights.adapters, strict=False)


def bundled(name: str) -> Path | None:
    """The weights file of that name that comes with petune, as `cifar100`."""
    path = BUNDLED / f"vit_nano_{name}.safetensors"
    return path if path.is_file() else None


def from_anywhere(weights: str) -> str:
    """The option `--weights` so that it means the same in any directory: a path that is there becomes absolute."""
    path = expand_home(weights)
    named = weights in {"default", "none"} or bundled(weights) is not None
    return weights if named or not path.exists() else str(path.absolute())


def find_weights(path: Path) -> Path:
    """The file that `--weights PATH` means: `path`, or the one in a pretraining run's directory.

    Raises:
        WeightsUnavailable: There is no such file.
    """
    path = expand_home(path)
    file = path / BACKBONE_FILE if path.is_dir() else path
    if not file.is_file():
        what = f"{path} is a directory without {BACKBONE_FILE}" if path.is_dir() else f"there is no file {path}"
        raise WeightsUnavailable(
            f"--weights takes default, none, cifar100, a safetensors file or the directory of a finished "
            f"`petune pretrain`; {what}"
        )
    return file


def read_weights(path: Path) -> Weights:
    """Read a safetensors file, a pretraining run's directory, or a foreign `.pt` (tensors only).

    Raises:
        WeightsUnavailable: There is no such file.
        CheckpointError: The file is damaged or is no weights file.
    """
    file = find_weights(path)
    if file.suffix in {".pt", ".pth", ".bin"}:
        return Weights(_read_torch(file), {}, str(file))
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (not a mapping)
            info = json.loads(metadata.get("petune", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file} must be a safetensors file, but: {error}") from None
    if not isinstance(info, dict):
        raise CheckpointError(f"{file} must say in its metadata what petune wrote, but `petune` is {info!r} there")
    return Weights(tensors, info, _named(file))


def load_into(model: nn.Module, weights: Weights, head_keys: set[str]) -> None:
    """Load all but the head, which always starts anew.

    Args:
        model: Of the same architecture; position embeddings of another size are resampled by timm's own filter.
        head_keys: Keys of the classifier in `model`; they are left alone.

    Raises:
        CheckpointError: A key is missing, left over, or has another shape.
    """
    tensors = {key: tensor for key, tensor in weights.tensors.items() if key not in weights.adapters}
    resample = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    here = model.state_dict()
    if resample is not None and any(k in here and here[k].shape != t.shape for k, t in tensors.items()):
        tensors = resample(tensors, model)
    wanted = {key for key in here if key not in head_keys}
    missing = sorted(wanted - set(tensors))
    heads = (*(key.rpartition(".")[0] + "." for key in head_keys), "head.", "fc.", "classifier.")
    extra = sorted(k for k in set(tensors) - wanted if k not in head_keys and not k.startswith(heads))
    shapes = [f"{k} {tuple(tensors[k].shape)} for {tuple(here[k].shape)}" for k in sorted(wanted & set(tensors))
              if tensors[k].shape != here[k].shape]  # fmt: skip
    if missing or extra or shapes:
        found = "; ".join(f"{len(v)} {w}: {', '.join(v[:3])}" for w, v in
                          (("missing", missing), ("left over", extra), ("of another shape", shapes)) if v)  # fmt: skip
        raise CheckpointError(f"{weights.source} must hold the weights of this backbone, but does not fit it ({found})")
    model.load_state_dict({key: tensors[key] for key in wanted}, strict=False)


def _named(file: Path) -> str:
    """The path, or for a file of petune its name and what it holds, which says as much on another machine."""
    if file.parent != BUNDLED:
        return str(file)
    return f"petune's {file.stem} (sha256 {hashlib.sha256(file.read_bytes()).hexdigest()[:8]})"


def _read_torch(file: Path) -> dict[str, Tensor]:
    import torch

    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what the unpickler stumbles over in a file that is none: KeyError, IndexError, …
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise CheckpointError(
            f"{file} must hold tensors only (it is read without running code), but: {reason}"
        ) from None
    for key in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise CheckpointError(f"{file} must hold a state_dict (names to tensors)")
    return loaded
