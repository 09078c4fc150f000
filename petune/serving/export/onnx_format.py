"""Write a model as ONNX."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from petune.base.errors import ExportError, MissingExtra
from petune.serving.export.image_check import ImageCheck
from petune.serving.export.onnx_preprocess import IMAGE, preprocessing_model
from petune.serving.export.traced import BATCH, OutputCheck, first_line, trace

if TYPE_CHECKING:
    import onnx

INPUT, OUTPUT = "images", "logits"
FILE = "the ONNX file in onnxruntime"
MAX_BYTES = 1_900_000_000
"""Bytes of weights: ONNX files are protobuf messages, which are limited to 2 GiB."""
USE_TORCH = "Name a file that ends in .pt2 instead"


def onnx_file(
    model: nn.Module, check: OutputCheck, info: str, images: ImageCheck | None = None
) -> tuple[bytes, float, float | None]:
    """Export an `.onnx` file, and run it in onnxruntime.

    Args:
        model: Merged, or with its adapters.
        check: Images and expected logits.
        info: Stored in the metadata under `petune`.
        images: The preprocessing to put before the model, and images of several sizes; None leaves it out.

    Returns:
        The file, its difference from the model (see `OutputCheck`), and the difference of pixels (see `ImageCheck`).

    Raises:
        MissingExtra: onnx, onnxscript or onnxruntime is not installed.
        ExportError: The model cannot be traced, is too large, has operations that ONNX lacks, or the file computes
            something else.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        raise MissingExtra("writing ONNX", "onnx") from None
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    if num_bytes > MAX_BYTES:
        raise ExportError(f"the weights are {num_bytes:,} bytes, and an ONNX file holds less than 2 GB. {USE_TORCH}")
    proto = _convert(model, check)
    if images is None:
        content = _finished(proto, info)
        session = _session(content)
        return content, check.difference(lambda x: _run(session, INPUT, x), FILE), None
    pixels = _session(preprocessing_model(images.transform, INPUT, proto).SerializeToString())
    pixel_difference = images.pixel_difference(lambda image: _run(pixels, IMAGE, image))
    content = _finished(_with_preprocessing(proto, images), info)
    session = _session(content)
    return content, images.outputs.difference(lambda x: _run(session, IMAGE, x), FILE), pixel_difference


def _session(content: bytes) -> Any:
    import onnxruntime

    try:
        return onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a separate class for each status
        raise ExportError(f"onnxruntime cannot run this model: {first_line(error)}. {USE_TORCH}") from error


def _run(session: Any, name: str, x: Tensor) -> Tensor:
    output: np.ndarray[Any, Any] = session.run(None, {name: x.numpy()})[0]
    return torch.from_numpy(output)


def _with_preprocessing(proto: onnx.ModelProto, images: ImageCheck) -> onnx.ModelProto:
    """Return a model that maps an image to logits."""
    from onnx import compose

    before = preprocessing_model(images.transform, "pixels", proto)
    return compose.merge_models(before, proto, io_map=[("pixels", INPUT)])


def _convert(model: nn.Module, check: OutputCheck) -> onnx.ModelProto:
    program = trace(model, check)
    with _errors_only("onnxscript", "onnx_ir", "torch.onnx"):
        try:
            exported = torch.onnx.export(
                program,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: BATCH},),
                dynamo=True,
                verbose=False,
                external_data=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise ExportError(f"the model cannot be converted to ONNX: {first_line(error)}. {USE_TORCH}") from error
    assert exported is not None
    return exported.model_proto


def _finished(proto: onnx.ModelProto, info: str) -> bytes:
    import onnx

    onnx.helper.set_model_props(proto, {"petune": info})
    onnx.checker.check_model(proto)
    content: bytes = proto.SerializeToString()
    return content


@contextmanager
def _errors_only(*names: str) -> Iterator[None]:
    """Let these loggers report errors only, inside the context."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
