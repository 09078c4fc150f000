"""Write a model as ONNX."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from petune.base.errors import ExportError, MissingExtra
from petune.serving.export.traced import BATCH, OutputCheck, first_line, trace

INPUT, OUTPUT = "images", "logits"
MAX_BYTES = 1_900_000_000
"""Bytes of weights: ONNX files are protobuf messages, which are limited to 2 GiB."""
USE_TORCH = "Name a file that ends in .pt2 instead"


def onnx_file(model: nn.Module, check: OutputCheck, info: str) -> tuple[bytes, float]:
    """Export an `.onnx` file, and run it in onnxruntime.

    Args:
        model: Merged, or with its adapters.
        check: Images and expected logits.
        info: Stored in the metadata under `petune`.

    Returns:
        The file, and its difference from the model; see `OutputCheck`.

    Raises:
        MissingExtra: onnx, onnxscript or onnxruntime is not installed.
        ExportError: The model cannot be traced, is too large, has operations that ONNX lacks, or the file computes
            something else.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError:
        raise MissingExtra("writing ONNX", "onnx") from None
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    if num_bytes > MAX_BYTES:
        raise ExportError(f"the weights are {num_bytes:,} bytes, and an ONNX file holds less than 2 GB. {USE_TORCH}")
    content = _convert(model, check, info)
    try:
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a separate class for each status
        raise ExportError(f"onnxruntime cannot run this model: {first_line(error)}. {USE_TORCH}") from error

    def compute(x_B3SS: Tensor) -> Tensor:
        return torch.from_numpy(session.run([OUTPUT], {INPUT: x_B3SS.numpy()})[0])

    return content, check.difference(compute, "the ONNX file in onnxruntime")


def _convert(model: nn.Module, check: OutputCheck, info: str) -> bytes:
    import onnx

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
    proto = exported.model_proto
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
