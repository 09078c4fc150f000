"""Write a model as a torch.export program without any pickle."""

from __future__ import annotations

import io
import zipfile
from typing import Any

import torch
from torch import nn

from petune.base.errors import ExportError
from petune.serving.export.traced import OutputCheck, trace

PICKLE_STARTS = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04")
"""First bytes of a pickle, or of a zip file with pickles in it."""
TENSOR_FOLDERS = ("/data/weights/", "/data/constants/")


def torch_file(model: nn.Module, check: OutputCheck, info: str) -> tuple[bytes, float]:
    """Export a `.pt2` file; `torch.export.load(FILE).module()` computes logits.

    Args:
        model: Merged, or with its adapters.
        check: Images and expected logits.
        info: Stored in the file under `petune`.

    Returns:
        The file, and its difference from the model; see `OutputCheck`.

    Raises:
        ExportError: The model cannot be traced, needs a pickle, or the file computes something else.
    """
    program = trace(model, check)
    program.example_inputs = None  # they would be stored as a pickle
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={"petune": info})
    content = buffer.getvalue()
    pickles = find_pickles(content)
    if pickles:
        raise ExportError(
            f"the .pt2 file of this model would contain pickles ({', '.join(pickles[:3])}). Name a file that ends in "
            ".onnx instead"
        )
    loaded: Any = torch.export.load(io.BytesIO(content)).module()
    return content, check.difference(loaded, "the .pt2 file")


def find_pickles(content: bytes) -> list[str]:
    """Return the members of a `.pt2` file that are pickles, archives of pickles, or an index that names some."""
    pickles = []
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for name in archive.namelist():
            data = archive.read(name)
            names_pickles = name.endswith(".json") and b'"use_pickle": true' in data
            is_tensor = any(folder in name for folder in TENSOR_FOLDERS)  # tensors may begin with any bytes
            if names_pickles or (data.startswith(PICKLE_STARTS) and not is_tensor):
                pickles.append(name)
    return pickles
