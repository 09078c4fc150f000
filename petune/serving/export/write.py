"""Restore a run, fold what folds, write the file, and prove that it computes what the model computed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save as save_tensors
from torch import nn

from petune.base.arguments import PathText, check_arguments
from petune.base.config import expand_home
from petune.base.errors import NotMergeable, UnknownName, UsageError
from petune.base.files import replace_file
from petune.serving.export.formats import Probe, onnx_file, probe_of, torch_file
from petune.serving.predict import Inputs
from petune.serving.restore import Restored, restore

Format = Literal["torch", "onnx", "safetensors"]
FORMATS: dict[Format, str] = {"torch": ".pt2", "onnx": ".onnx", "safetensors": ".safetensors"}
"""Format and what its files are called."""


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        merged: Whether the adapters are folded into the weights; otherwise they are parts of the program.
        reason: Why they are not.
        difference: The largest difference between the file's logits and the model's, relative to the largest logit (or
            1): over random images in batches of 1, 2 and 5.
    """

    output: str
    format: Format
    bytes: int
    method: str
    merged: bool
    reason: str
    difference: float


def export(
    path: str | Path,
    out: str | Path,
    *,
    to: Format | None = None,
    weights: str | None = None,
    trust_remote_code: bool = False,
) -> Exported:
    """Write a trained model for use without petune: `petune.export("runs/pets", "pets.onnx")`.

    `.pt2` (torch.export) and `.onnx` take normalised images, float32 (batch, 3, S, S) with any batch size, and give
    logits. `.safetensors` are the backbone's own weights, for methods that fold into them: timm and `--weights` read
    them. The classes, the size and the statistics of the images are in each file, as JSON under `petune`. No file
    holds a pickle.

    Args:
        path: A run directory, or an adapter directory.
        out: The file to write; a new one.
        to: None is what the file's name says.
        weights: Where the backbone's weights are now; None takes them from where the run did.
        trust_remote_code: Call the function that builds the backbone, where it is `package.module:factory`.

    Raises:
        UsageError: `out` exists, or is not called as files of the format are.
        MissingExtra: ONNX without its packages.
        NotMergeable: safetensors of a method that is no change of weights.
        ExportError: The format cannot hold the model, or computes something else.
        CheckpointError: See `petune.restore`, or the file cannot be written.
    """
    optional = {
        "to": (to, str | None),
        "weights": (weights, str | None),
        "trust_remote_code": (trust_remote_code, bool),
    }
    check_arguments("petune.export", path=(path, PathText), out=(out, PathText), **optional)
    file = expand_home(out)
    to = _format(file, to)
    restored = restore(Path(path), weights, trust_remote_code=trust_remote_code)
    model, method = restored.backbone.model.eval(), restored.attachment.name
    checks = probe_of(model, restored.backbone.image_size)
    reason = _merge(restored)
    if to == "safetensors" and reason:
        raise NotMergeable(
            f"{reason}. As a program it can be written with its adapters: --format torch or --format onnx"
        )
    info = json.dumps(_info(restored, method, not reason))
    content, difference = _content(to, model, checks, info)
    replace_file(file, content)
    return Exported(str(file), to, len(content), method, not reason, reason, difference)


def _format(file: Path, to: Format | None) -> Format:
    by_name = {suffix: name for name, suffix in FORMATS.items()}
    found = to or by_name.get(file.suffix)
    if to is not None and to not in FORMATS:
        raise UnknownName("format", to, FORMATS)
    if found is None or file.suffix != FORMATS[found]:
        called = f"end in {FORMATS[found]}" if found else f"end in {', '.join(by_name)}"
        raise UsageError(f"the file to export to must {called}, but is {file}")
    if file.exists():
        raise UsageError(f"the file to export to must be a new one, but {file} exists already")
    return found


def _merge(restored: Restored) -> str:
    """Fold the adapters; return why that cannot be done."""
    try:
        restored.attachment.merge()
    except NotMergeable as error:
        return str(error)
    return ""


def _content(to: Format, model: nn.Module, checks: Probe, info: str) -> tuple[bytes, float]:
    if to == "torch":
        return torch_file(model, checks, info)
    if to == "onnx":
        return onnx_file(model, checks, info)
    tensors = {key: t.detach().cpu().contiguous() for key, t in model.state_dict().items()}
    return save_tensors(tensors, metadata={"petune": info}), checks.difference(model, "the folded model")


def _info(restored: Restored, method: str, merged: bool) -> dict[str, Any]:
    """What the file says of itself; `petune run --weights FILE` reads it too."""
    card, backbone, inputs = restored.card, restored.backbone, Inputs.of(restored.card)
    return {
        "backbone": card["backbone"]["name"],
        "full_name": backbone.full_name,
        "image_size": backbone.image_size,
        "mean": card["preprocess"]["mean"],
        "std": card["preprocess"]["std"],
        "stored_size": inputs.stored_size,
        "crop": inputs.crop,
        "interpolation": "bicubic",
        "classes": card["classes"],
        "method": method,
        "merged": merged,
        "test": card.get("test"),
    }
