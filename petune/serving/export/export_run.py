"""Export a run: rebuild the model, merge what can be merged, write the file, and check what it computes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from petune.base.arguments import PathText, check_arguments
from petune.base.config import expand_home
from petune.base.errors import NotMergeable, UnknownName, UsageError
from petune.base.files import replace_file
from petune.serving.export.image_check import ImageCheck
from petune.serving.export.onnx_format import onnx_file
from petune.serving.export.torch_format import torch_file
from petune.serving.export.traced import OutputCheck
from petune.serving.image_transform import ImageTransform
from petune.serving.restore import Restored, restore
from petune.training.task_registry import describe_task

ExportFormat = Literal["torch", "onnx", "safetensors"]
FORMATS: dict[ExportFormat, str] = {"torch": ".pt2", "onnx": ".onnx", "safetensors": ".safetensors"}
"""Format to file extension."""

ACTIVATIONS = {
    "classification": "softmax",
    "multi_label": "sigmoid",
    "regression": "output * std + mean",
    "segmentation": "softmax",
}
"""What turns outputs into probabilities or numbers, by built-in task; `std` and `mean` are in the task's state. Classes
of a mask are axis 1."""


@dataclass(frozen=True)
class Exported:
    """Summary of an export.

    Attributes:
        output: The file.
        format: Its format.
        bytes: Its size.
        method: What was trained.
        merged: True if the adapters are merged into the weights; otherwise they are part of the program.
        reason: Why they are not merged.
        difference: Largest difference between the logits of the file and of the model, relative to the largest logit
            (or 1), over random images in batches of 1, 2 and 5; with preprocessing, over images of four sizes.
        pixel_difference: With preprocessing, the largest difference between the pixels that the model gets, in levels
            of 255.
    """

    output: str
    format: ExportFormat
    bytes: int
    method: str
    merged: bool
    reason: str
    difference: float
    pixel_difference: float | None = None


def export(
    path: str | Path,
    out: str | Path,
    *,
    format: ExportFormat | None = None,
    with_preprocessing: bool = False,
    weights: str | None = None,
    trust_remote_code: bool = False,
) -> Exported:
    """Export a trained model for use without petune: `petune.export("runs/pets", "pets.onnx")`.

    `.pt2` (torch.export) and `.onnx` map normalized images, float32 (batch, 3, S, S) with any batch size, to logits.
    `.safetensors` holds the backbone's own weights, for methods that merge into them; timm and `weights=` read it. Each
    file holds the class names and the preprocessing, as JSON under `petune`. No file contains a pickle.

    Args:
        path: A run directory, or an adapter directory.
        out: The file to create.
        format: None chooses by the extension of `out`.
        with_preprocessing: Put the preprocessing into the program, so that it maps one image `image` of any size,
            uint8 (height, width, 3), to logits (1, …). A model of other channels takes them in the type that it was
            trained with. For `.onnx` only.
        weights: Where the backbone's weights are now; None takes them from where the run did.
        trust_remote_code: Allow a backbone that is built by the function `package.module:factory`.

    Raises:
        UsageError: `out` exists, has another extension, or its format has no preprocessing.
        MissingExtra: ONNX needs packages that are not installed.
        NotMergeable: The method cannot be merged, and safetensors was requested.
        ExportError: The format cannot represent the model, or the file computes something else.
        CheckpointError: See `petune.Predictor`, or the file cannot be written.
    """
    check_arguments(
        "petune.export",
        path=(path, PathText),
        out=(out, PathText),
        format=(format, str | None),
        with_preprocessing=(with_preprocessing, bool),
        weights=(weights, str | None),
        trust_remote_code=(trust_remote_code, bool),
    )
    file = expand_home(out)
    chosen = _choose_format(file, format)
    if with_preprocessing and chosen != "onnx":
        raise UsageError(
            f"a file in format {chosen} has no preprocessing. Name a file that ends in .onnx",
            cli_hint="Or leave out --with-preprocessing",
        )
    restored = restore(Path(path), weights, trust_remote_code=trust_remote_code)
    model, method = restored.backbone.model.eval(), restored.attachment.name
    transform = ImageTransform.from_metadata(restored.metadata)
    if with_preprocessing and transform.sampling is not None:
        raise UsageError(
            "the model takes clips, and the preprocessing of videos cannot be exported. Export it without",
            cli_hint="Leave out --with-preprocessing",
        )
    check = OutputCheck.of(model, restored.attachment.sites.input_spec)
    images = ImageCheck.of(model, transform) if with_preprocessing else None
    reason = _merge(restored)
    if chosen == "safetensors" and reason:
        raise NotMergeable(f"{reason}. Name a file that ends in .pt2 or .onnx instead: these formats include adapters")
    info = json.dumps(_info(restored, transform, method, merged=not reason, with_preprocessing=with_preprocessing))
    content, difference, pixel_difference = _convert(chosen, model, check, info, images)
    replace_file(file, content)
    return Exported(str(file), chosen, len(content), method, not reason, reason, difference, pixel_difference)


def _choose_format(file: Path, format: ExportFormat | None) -> ExportFormat:
    if format is not None and format not in FORMATS:
        raise UnknownName("format", format, FORMATS)
    by_extension = {extension: name for name, extension in FORMATS.items()}
    chosen = format or by_extension.get(file.suffix)
    if chosen is None:
        raise UsageError(f"cannot tell the format of {file}. Its name must end in {', '.join(by_extension)}")
    if file.suffix != FORMATS[chosen]:
        raise UsageError(f"the name of a file in format {chosen} must end in {FORMATS[chosen]}, not as {file}")
    if file.exists():
        raise UsageError(f"{file} already exists. Name a new file")
    return chosen


def _merge(restored: Restored) -> str:
    """Merge the adapters into the weights; return the reason if that is impossible."""
    try:
        restored.attachment.merge()
    except NotMergeable as error:
        return str(error)
    return ""


def _convert(
    format: ExportFormat, model: nn.Module, check: OutputCheck, info: str, images: ImageCheck | None
) -> tuple[bytes, float, float | None]:
    """Return the file, and its differences from the model and from its preprocessing."""
    if format == "torch":
        return *torch_file(model, check, info), None
    if format == "onnx":
        return onnx_file(model, check, info, images)
    return (
        save_tensors(_own_tensors(model), metadata={"petune": info}),
        check.difference(model, "the merged model"),
        None,
    )


def _own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the state of a model on the CPU; what two keys share is copied, because a file holds it for each."""
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for key, tensor in model.state_dict().items():
        own = tensor.detach().cpu().contiguous()
        storage = own.untyped_storage().data_ptr()
        tensors[key] = own.clone() if storage in storages else own
        storages.add(storage)
    return tensors


def _info(
    restored: Restored, transform: ImageTransform, method: str, *, merged: bool, with_preprocessing: bool
) -> dict[str, Any]:
    """Describe the model, for users of the file and for `petune run --weights FILE`."""
    metadata, backbone, task = restored.metadata, restored.backbone, restored.task
    return {
        "backbone": metadata["backbone"]["name"],
        "full_name": backbone.full_name,
        "image_size": backbone.image_size,
        "mean": metadata["preprocess"]["mean"],
        "std": metadata["preprocess"]["std"],
        "stored_size": transform.stored_size,
        "crop": transform.crop,
        "interpolation": "bicubic",
        "channels": transform.form.channels,
        "dtype": transform.form.dtype,
        "with_preprocessing": with_preprocessing,
        **({"clip": asdict(transform.sampling)} if transform.sampling is not None else {}),
        "classes": metadata["classes"],
        "task": describe_task(task),
        "activation": ACTIVATIONS.get(task.name),
        "method": method,
        "merged": merged,
        "test": metadata.get("test"),
    }
