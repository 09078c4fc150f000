"""The two formats that hold a program: torch.export's and ONNX; and the proof that they compute the same.

Shapes: B batch, S side of an image, C classes.
"""

from __future__ import annotations

import io
import logging
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from petune.base.errors import ExportError, MissingExtra
from petune.sites.logits import logits_of

INPUT, OUTPUT, BATCH = "images", "logits", "batch"
MOST_DIFFERENT = 1e-4
"""Of the largest logit: other kernels add up in another order; what is wrong is wrong by far more."""
ONNX_LIMIT = 1_900_000_000
"""Bytes of weights: protobuf, which ONNX files are, ends at 2 GiB."""


@dataclass(frozen=True)
class Probe:
    """Images (B, 3, S, S) in batches of several sizes, and what the trained model makes of each."""

    images: tuple[Tensor, ...]
    expected: tuple[Tensor, ...]

    def difference(self, compute: Callable[[Tensor], Tensor], what: str) -> float:
        """The largest difference of its logits, relative to the largest logit (or 1).

        Raises:
            ExportError: It is too large.
        """
        largest = 0.0
        with torch.no_grad():
            for x_B3SS, expected_BC in zip(self.images, self.expected, strict=True):
                logits_BC = logits_of(compute(x_B3SS))
                if logits_BC.shape != expected_BC.shape:
                    shapes = f"{tuple(expected_BC.shape)}, but it gave {tuple(logits_BC.shape)}"
                    raise ExportError(f"{what} must give logits of shape {shapes}; nothing was written")
                off = (logits_BC - expected_BC).abs().max() / expected_BC.abs().max().clamp(min=1)
                largest = max(largest, float(off))
        if not largest <= MOST_DIFFERENT:
            raise ExportError(
                f"{what} must give the model's logits within {MOST_DIFFERENT:g}, but is off by {largest:.2g}; nothing "
                "was written"
            )
        return largest


def probe_of(model: nn.Module, image_size: int) -> Probe:
    """Random images, always the same ones, and the model's logits."""
    generator = torch.Generator().manual_seed(0)
    sizes = (2, 1, 5)  # the first is the one that is traced
    images = tuple(torch.randn(n, 3, image_size, image_size, generator=generator) for n in sizes)
    with torch.no_grad():
        return Probe(images, tuple(logits_of(model(x)) for x in images))


def torch_file(model: nn.Module, checks: Probe, info: str) -> tuple[bytes, float]:
    """A `.pt2` file: `torch.export.load(FILE).module()` computes logits. It holds no pickle.

    Raises:
        ExportError: The model cannot be traced, needs a pickle, or computes something else.
    """
    program = _program(model, checks)
    program.example_inputs = None  # they would be stored as a pickle, and nobody needs them
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={"petune": info})
    content = buffer.getvalue()
    pickled = pickled_parts(content)
    if pickled:
        raise ExportError(
            f"a .pt2 file must not need a pickle, but this model's would ({', '.join(pickled[:3])}); use --format onnx"
        )
    loaded: Any = torch.export.load(io.BytesIO(content)).module()
    return content, checks.difference(loaded, "the .pt2 file")


def pickled_parts(content: bytes) -> list[str]:
    """The parts of a `.pt2` file that are pickles, or archives with pickles inside, or that its index calls so."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    raw = ("/data/weights/", "/data/constants/")  # bytes of tensors, which may begin with anything
    found = [name for name, data in parts.items() if name.endswith(".json") and b'"use_pickle": true' in data]
    for name, data in parts.items():
        if not any(place in name for place in raw) and data[:2] in {b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04"}:
            found.append(name)
    return found


def onnx_file(model: nn.Module, checks: Probe, info: str) -> tuple[bytes, float]:
    """An `.onnx` file, run once in onnxruntime.

    Raises:
        MissingExtra: onnx, onnxscript or onnxruntime is not installed.
        ExportError: The model cannot be traced, is too large, has what ONNX has not, or computes something else.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 (torch needs it)
    except ImportError:
        raise MissingExtra("writing ONNX", "onnx") from None
    weigh = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    if weigh > ONNX_LIMIT:
        raise ExportError(f"an ONNX file holds less than 2 GB, but the weights are {weigh:,} bytes; use --format torch")
    program = _program(model, checks)
    with _quiet("onnxscript", "onnx_ir", "torch.onnx"):
        try:
            made = torch.onnx.export(
                program,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: BATCH},),
                dynamo=True,
                verbose=False,
                external_data=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise ExportError(f"ONNX cannot hold this model: {_first_line(error)}; use --format torch") from error
    assert made is not None
    proto = made.model_proto
    onnx.helper.set_model_props(proto, {"petune": info})
    onnx.checker.check_model(proto)
    content: bytes = proto.SerializeToString()
    try:
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a class of its own for each status
        raise ExportError(f"onnxruntime cannot run this model: {_first_line(error)}; use --format torch") from error

    def compute(x_B3SS: Tensor) -> Tensor:
        return torch.from_numpy(session.run([OUTPUT], {INPUT: x_B3SS.numpy()})[0])

    return content, checks.difference(compute, "the ONNX file in onnxruntime")


def _program(model: nn.Module, checks: Probe) -> Any:
    """The model traced with a free batch size."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    try:
        with torch.no_grad():
            return torch.export.export(
                _Logits(model), (checks.images[0],), dynamic_shapes=({0: torch.export.Dim(BATCH)},)
            )
    except Exception as error:  # torch.export raises a dozen types, and each means that this model is not traceable
        raise ExportError(
            f"torch.export must trace the model with a free batch size, but: {type(error).__name__}: "
            f"{_first_line(error)}; --debug shows where"
        ) from error


class _Logits(nn.Module):
    """A model that returns logits and nothing around them (transformers' do)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) to (B, C)."""
        return logits_of(self.model(images))


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Inside, these loggers say errors only: what an optimizer skipped is of no use to who exports."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "no reason given")
