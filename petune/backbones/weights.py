"""Read a backbone's weights from a file, a pretraining run, or the package itself. Never fall back to random ones."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from petune.backbones.from_file import fill_empty, has_values
from petune.backbones.input_channels import adapted_tensors
from petune.backbones.torch_checkpoint import (
    is_torch_checkpoint,
    map_torch_checkpoint,
    read_torch_checkpoint,
    without_wrappers,
)
from petune.backbones.transformers_weights import renamed_tensors
from petune.base.config import expand_home
from petune.base.errors import CheckpointError, WeightsUnavailable
from petune.base.text import printable
from petune.sites.file_values import MappedFile, can_map

BUNDLED = Path(__file__).with_name("pretrained")
BACKBONE_FILE = "backbone.safetensors"
FLOAT8 = frozenset({torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz})
READABLE = FLOAT8 | {torch.float64, torch.float32, torch.float16, torch.bfloat16}
"""Number formats of weights that are converted to the backbone's."""


@dataclass(frozen=True)
class Weights:
    """Tensors of a file, and its description of itself.

    Attributes:
        tensors: By state_dict key, as stored.
        info: The `petune` entry of the metadata: backbone, preprocessing, results; empty for files of others.
        source: Where they come from, for the record and for messages.
        mapped: The file, if the tensors are mapped.
    """

    tensors: Mapping[str, Tensor]
    info: Mapping[str, Any]
    source: str
    mapped: MappedFile | None = None

    @property
    def adapters(self) -> dict[str, Tensor]:
        """Tensors of the adapters that were attached during pretraining, by their key in the model."""
        keys = self.info.get("adapters")
        return {key: tensor for key, tensor in self.tensors.items() if key in keys} if isinstance(keys, list) else {}


def load_adapters(model: nn.Module, weights: Weights, method: str) -> None:
    """Start a method's adapters from the adapters of the pretraining.

    Raises:
        CheckpointError: The method has other adapters; the backbone was trained with these and is incomplete without.
    """
    state = model.state_dict()
    mismatched = sorted(
        key for key, tensor in weights.adapters.items() if key not in state or state[key].shape != tensor.shape
    )
    if mismatched:
        raise CheckpointError(
            f"{weights.source} was pretrained with the adapters of {weights.info.get('method')}, but {method} has none "
            f"that fit {mismatched[0]}. Use the method and options of the pretraining"
        )
    model.load_state_dict(weights.adapters, strict=False)


def bundled_file(name: str) -> Path | None:
    """Return the weights file that comes with petune under a name, such as `cifar100`."""
    path = BUNDLED / f"vit_nano_{name}.safetensors"
    return path if path.is_file() else None


def absolute_weights(weights: str) -> str:
    """Return the option `weights` so that it means the same in any directory: existing paths become absolute."""
    path = expand_home(weights)
    is_name = weights in {"default", "none"} or bundled_file(weights) is not None
    return weights if is_name or not path.exists() else str(path.absolute())


def find_weights(path: Path) -> Path:
    """Return the weights file at `path`, or the one in the directory of a pretraining run.

    Raises:
        WeightsUnavailable: There is no such file.
    """
    path = expand_home(path)
    file = path / BACKBONE_FILE if path.is_dir() else path
    if not file.is_file():
        problem = f"there is no {BACKBONE_FILE} in {path}" if path.is_dir() else f"no such weights file: {path}"
        raise WeightsUnavailable(
            f"{problem}. weights is default, none, cifar100, a safetensors file, a checkpoint of "
            "torch, or the directory of a finished pretraining run",
            cli_hint="Set it with --weights",
        )
    return file


def read_weights(path: Path) -> Weights:
    """Read a safetensors file, the directory of a pretraining run, or a checkpoint of torch (tensors only).

    Raises:
        WeightsUnavailable: There is no such file.
        CheckpointError: The file is damaged or not a weights file.
    """
    file = find_weights(path)
    try:
        if is_torch_checkpoint(file):
            in_place = map_torch_checkpoint(file)
            mapped, tensors, entry = in_place or (None, *read_torch_checkpoint(file))
            return Weights(tensors, {}, f"{file} ({entry})" if entry else str(file), mapped)
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            mapped = MappedFile(file) if can_map() else None
            known = mapped.tensors if mapped is not None else {}
            tensors = {k: known[k] if k in known else opened.get_tensor(k) for k in opened.keys()}  # noqa: SIM118 (not a mapping)
            info = json.loads(metadata.get("petune", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {file} as safetensors: {printable(str(error))}") from None
    if not isinstance(info, dict):
        raise CheckpointError(f"the metadata of {file} is damaged: `petune` is {info!r}, not a mapping")
    if _is_wrapped(tensors, info):
        tensors = {_unwrapped_key(key): tensor for key, tensor in tensors.items()}
        info = {**info, "adapters": [_unwrapped_key(str(key)) for key in info.get("adapters") or ()]}
    return Weights(tensors if info else without_wrappers(tensors), info, _source(file), mapped)


def _is_wrapped(tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> bool:
    """Return True for a pretraining of a transformers model whose keys start with `model`, as in early versions."""
    is_inner = [key.startswith("model.") for key in tensors]
    in_wrapper = all(inner or key.startswith("head.") for key, inner in zip(tensors, is_inner, strict=True))
    return str(info.get("backbone")).startswith("hf:") and any(is_inner) and in_wrapper


def _unwrapped_key(key: str) -> str:
    return "classifier." + key.removeprefix("head.") if key.startswith("head.") else key.removeprefix("model.")


def load_into(model: nn.Module, weights: Weights, head_keys: set[str], *, stay_in_file: bool = False) -> None:
    """Load everything but the head, which keeps its fresh initialization; see `fitting_tensors`.

    Args:
        model: What is on the meta device gets its values; a head there stays as it is.
        weights, head_keys: See `fitting_tensors`.
        stay_in_file: See `build_from_file`.

    Raises:
        CheckpointError: See `fitting_tensors`.
    """
    tensors = fitting_tensors(model, weights, head_keys)
    if has_values(model) or weights.mapped is None:
        model.load_state_dict(tensors, strict=False)
        if weights.mapped is not None:
            weights.mapped.forget()
    else:
        fill_empty(model, tensors, weights.mapped, stay_in_file=stay_in_file)


def fitting_tensors(model: nn.Module, weights: Weights, head_keys: set[str]) -> dict[str, Tensor]:
    """Return the tensors of a file for everything but the head.

    Args:
        model: Of the same architecture; timm's own filter resamples position embeddings of another size. It may be on
            the meta device.
        weights: What to load.
        head_keys: Keys of the classifier in `model`.

    Raises:
        CheckpointError: A key is missing, unexpected, or has another shape.
    """
    tensors: Mapping[str, Tensor] = {k: tensor for k, tensor in weights.tensors.items() if k not in weights.adapters}
    tensors = adapted_tensors(model, renamed_tensors(model, tensors))
    state = model.state_dict()
    resample = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if resample is not None and any(k in state and state[k].shape != tensor.shape for k, tensor in tensors.items()):
        tensors = _resampled(model, tensors, resample, weights.source)
    head_keys = head_keys | _other_classifiers(model, tensors)
    wanted = {key: tensor for key, tensor in state.items() if key not in head_keys}
    problems = _mismatches(wanted, tensors, head_keys, weights.mapped)
    if problems:
        raise CheckpointError(f"{weights.source} does not fit this backbone: {'; '.join(problems)}")
    return {key: tensors[key] for key in wanted}


def _resampled(
    model: nn.Module, tensors: Mapping[str, Tensor], resample: Callable[..., Mapping[str, Tensor]], source: str
) -> Mapping[str, Tensor]:
    """Return what timm's own filter makes of tensors, which takes a position embedding of any size for one of patches.

    Raises:
        CheckpointError: It cannot, such as for weights without registers in a model that has them.
    """
    try:
        return resample(tensors, model)
    except Exception as error:  # whatever timm raises for tensors that it did not expect
        state = model.state_dict()
        key = next(k for k, tensor in tensors.items() if k in state and state[k].shape != tensor.shape)
        raise CheckpointError(
            f"{source} does not fit this backbone: {key} {tuple(tensors[key].shape)} cannot be resampled to "
            f"{tuple(state[key].shape)} ({' '.join(str(error).split())[:200]}). Build the backbone with the options of "
            "the weights, such as the number of registers"
        ) from None


def _other_classifiers(model: nn.Module, tensors: Mapping[str, Tensor]) -> set[str]:
    """Return the keys of classifiers with another number of classes that timm names next to the head (VOLO's)."""
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    named = config.get("classifier") or ()
    prefixes = tuple(f"{path}." for path in ([named] if isinstance(named, str) else named))
    keys = {key: t for key, t in model.state_dict().items() if key.startswith(prefixes) and key in tensors}
    return {key for key, tensor in keys.items() if tensors[key].shape != tensor.shape}


def _mismatches(
    wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor], head_keys: set[str], mapped: MappedFile | None
) -> list[str]:
    """Describe missing and unexpected keys and wrong shapes; classifiers of the file are ignored."""
    heads = (*(key.rpartition(".")[0] + "." for key in head_keys), "head.", "fc.", "classifier.", "dense_head.")
    missing = sorted(wanted.keys() - tensors.keys())
    unexpected = sorted(
        key for key in tensors.keys() - wanted.keys() if key not in head_keys and not key.startswith(heads)
    )
    shapes = [
        f"{key} {tuple(tensors[key].shape)} instead of {tuple(wanted[key].shape)}"
        for key in sorted(wanted.keys() & tensors.keys())
        if tensors[key].shape != wanted[key].shape
    ]
    kinds = (
        ("missing", missing),
        ("unexpected", unexpected),
        ("of another shape", shapes),
        *_faulty(wanted, tensors, mapped),
    )
    return [f"{len(keys)} {kind}: {printable(', '.join(keys[:3]))}" for kind, keys in kinds if keys]


def _faulty(
    wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor], mapped: MappedFile | None
) -> Iterator[tuple[str, list[str]]]:
    """Yield what is wrong with values, and the keys: whole numbers as weights, which are quantized, and NaN."""
    fitting = [key for key in sorted(wanted.keys() & tensors.keys()) if wanted[key].shape == tensors[key].shape]
    dtypes = {key: tensors[key].dtype for key in fitting if wanted[key].is_floating_point()}
    for kind in sorted({*dtypes.values()} - READABLE, key=str):
        is_quantized = not kind.is_floating_point and not kind.is_complex and kind != torch.bool
        name = "quantized (whole numbers)" if is_quantized else f"of type {str(kind).removeprefix('torch.')}"
        yield name, [key for key, dtype in dtypes.items() if dtype == kind]
    floating = [key for key, dtype in dtypes.items() if dtype in READABLE]
    yield "with NaN or infinite values", [key for key in floating if not _is_finite(tensors[key], mapped)]


def _is_finite(tensor: Tensor, mapped: MappedFile | None) -> bool:
    part = mapped.slice_of(tensor) if mapped is not None else None
    values = tensor if part is None else part.read()
    return bool((values.float() if values.dtype in FLOAT8 else values).isfinite().all())


def _source(file: Path) -> str:
    """Return the path, or for a bundled file its name and digest, which mean the same on another machine."""
    if file.parent != BUNDLED:
        return str(file)
    return f"petune's {file.stem} (sha256 {hashlib.sha256(file.read_bytes()).hexdigest()[:8]})"
