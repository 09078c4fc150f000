"""The preprocessing of a trained model as an ONNX graph: from an image of any size to the model's input.

It computes what torch computes for 8 bits, and Pillow for other types: bicubic with antialiasing, in the same order and
the same integers, with rounding to 8 bits after each axis. So the pixels are those that `petune.predict` sees.

Legend: H height, W width, C channels, S side of a stored image, T side of the model's input, M pixels of an axis that
count, R resized pixels of an axis, K pixels that count for one of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from petune.data.bands import RGB
from petune.data.preprocess import GRAY_WEIGHTS, WHITE_16_BIT, center_crop
from petune.data.squares import MAX_ASPECT
from petune.serving.export.onnx_graph import Graph, Value
from petune.serving.image_transform import ImageTransform

if TYPE_CHECKING:
    import onnx

IMAGE = "image"
SUPPORT = 2.0
"""Of the bicubic filter, in pixels of the smaller image."""
PARTS = 8
"""Of the square's columns: each takes a part of the image's, or most weights of large images would be 0."""
MAX_BITS = 22
WEIGHT_LIMIT = float(1 << 15)
"""torch's weights for 8 bits are whole numbers of 2⁻ᵇ: with as many bits b as the largest one has room for."""


@dataclass(frozen=True)
class _Axis:
    """The computation of the square's pixels from an axis of the image.

    Attributes:
        start, length: Pixels of the image that count.
        scale: How many of them there are per resized pixel.
        first: Where the first resized pixel begins.
        resized: How many there are.
        margin: Which of them is the square's first.
    """

    start: Value
    length: Value
    scale: Value
    first: Value | float
    resized: Value
    margin: Value


def preprocessing_model(transform: ImageTransform, output: str, like: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model that maps `image` (H, W, C) to the model's input, float32 (1, C, T, T).

    Args:
        transform: The steps.
        output: Name of the output.
        like: A model whose versions of ONNX it gets.
    """
    from onnx import TensorProto, helper

    graph, form = Graph(), transform.form
    image_HWC = graph.value(IMAGE)
    stored_CSS = _stored(graph, image_HWC, transform.stored_size, is_rgb=form == RGB, dtype=form.dtype)
    x_1CTT = _input(graph, stored_CSS, transform)
    graph.node("Identity", x_1CTT)
    graph.nodes[-1].output[0] = output
    side, channels = transform.preprocess.image_size, len(transform.preprocess.mean)
    dtype = helper.np_dtype_to_tensor_dtype(np.dtype(form.dtype))
    inputs = [helper.make_tensor_value_info(IMAGE, dtype, ["height", "width", form.channels])]
    outputs = [helper.make_tensor_value_info(output, TensorProto.FLOAT, [1, channels, side, side])]
    proto = helper.make_graph(graph.nodes, "preprocessing", inputs, outputs, graph.constants)
    return helper.make_model(proto, opset_imports=like.opset_import, ir_version=like.ir_version)


def _stored(graph: Graph, image_HWC: Value, side: int, *, is_rgb: bool, dtype: str) -> Value:
    """Return the center square of an image at S pixels, (C, S, S): see `center_pixels` and `center_plane`."""
    shape = graph.node("Shape", image_HWC)
    height, width = (graph.node("Gather", shape, axis) for axis in (0, 1))
    shorter = height.minimum(width)
    axes = [(_rgb_axis if is_rgb else _plane_axis)(graph, length, shorter, side) for length in (height, width)]
    rows_SM, row_bounds = _weights(graph, axes[0], np.arange(side))
    row_unit, column_unit = (_unit(graph, axis) if is_rgb else None for axis in axes)
    parts = []
    for numbers_N in np.array_split(np.arange(side), min(PARTS, side)):
        columns_NM, column_bounds = _weights(graph, axes[1], numbers_N)
        x_CMM = _crop(graph, image_HWC, row_bounds, column_bounds).to(np.float64).transpose(2, 0, 1)
        weights_NM = columns_NM if column_unit is None else _whole(graph, columns_NM, column_unit)
        parts.append(x_CMM @ weights_NM.transpose(1, 0))
    x_CMS = graph.node("Concat", *parts, axis=2)
    if row_unit is not None and column_unit is not None:
        x_CMS = _to_8_bit(x_CMS, column_unit)
        return _to_8_bit(_whole(graph, rows_SM, row_unit) @ x_CMS, row_unit).to(np.float32)
    x_CSS = (rows_SM @ x_CMS.to(np.float32).to(np.float64)).to(np.float32)
    return x_CSS if dtype == "float32" else graph.node("Round", x_CSS).clip(*_levels(np.iinfo(dtype).max))


def _rgb_axis(graph: Graph, length: Value, shorter: Value, side: int) -> _Axis:
    """Return an axis as torch resizes it; see `petune.data.squares.Span`."""
    kept = length.minimum(shorter * MAX_ASPECT)
    resized = kept * side / shorter
    margin = graph.node("Round", (resized - side).to(np.float64) / 2.0).to(np.int64)
    scale = kept.to(np.float64) / resized.to(np.float64)
    return _Axis((length - kept) / 2, kept, scale, 0.0, resized, margin)


def _plane_axis(graph: Graph, length: Value, shorter: Value, side: int) -> _Axis:
    """Return an axis as Pillow resizes the square, whose bounds it keeps as float32."""
    axis = _rgb_axis(graph, length, shorter, side)
    first, last = (((axis.margin + more).to(np.float64) * axis.scale).to(np.float32) for more in (0, side))
    scale = (last - first).to(np.float64) / float(side)
    return replace(axis, scale=scale, first=first.to(np.float64), margin=graph.constant(np.array(0)))


def _crop(graph: Graph, image_HWC: Value, rows: tuple[Value, Value], columns: tuple[Value, Value]) -> Value:
    one = np.array([1], np.int64)
    starts, ends = (
        graph.node("Concat", *(graph.node("Reshape", bounds[i], one) for bounds in (rows, columns)), axis=0)
        for i in (0, 1)
    )
    return graph.node("Slice", image_HWC, starts, ends, np.array([0, 1], np.int64))


def _weights(graph: Graph, axis: _Axis, numbers_N: NDArray[Any]) -> tuple[Value, tuple[Value, Value]]:
    """Return the share of pixels of the image in N of the square's, float64 (N, M), and the bounds of these pixels."""
    numbers_N1 = axis.margin + numbers_N[:, None]
    begin_N1, end_N1 = _reach(axis, numbers_N1)
    low, high = graph.node("ReduceMin", begin_N1, keepdims=0), graph.node("ReduceMax", end_N1, keepdims=0)
    weights_NM = _shares(graph, axis, numbers_N1, graph.arange(high - low) + low)
    return weights_NM, (axis.start + low, axis.start + high)


def _unit(graph: Graph, axis: _Axis) -> Value:
    """Return 2ᵇ; the weights of all resized pixels count, also of those that are cropped."""
    numbers_R1 = graph.arange(axis.resized).reshape(-1, 1)
    begin_R1, _ = _reach(axis, numbers_R1)
    taps = (axis.scale.maximum(1.0) * (2 * SUPPORT)).to(np.int64) + 2
    weights_RK = _shares(graph, axis, numbers_R1, begin_R1 + graph.arange(taps))
    largest = graph.node("ReduceMax", weights_RK, keepdims=0)
    units = 2.0 ** np.arange(1, MAX_BITS + 1)
    bits = ((largest * units + 0.5).floor() < WEIGHT_LIMIT).to(np.int64).sum(0)
    return graph.node("Gather", 2.0 ** np.arange(MAX_BITS + 1), bits)


def _centers(axis: _Axis, numbers: Value) -> Value:
    """Return the centers of resized pixels, in pixels of the image."""
    return axis.scale * (numbers.to(np.float64) + 0.5) + axis.first


def _reach(axis: _Axis, numbers: Value) -> tuple[Value, Value]:
    """Return the first pixel of the image that counts for a resized one, and the one after the last."""
    center, support = _centers(axis, numbers), axis.scale.maximum(1.0) * SUPPORT
    begin = (center - support + 0.5).to(np.int64).maximum(0)
    return begin, (center + support + 0.5).to(np.int64).minimum(axis.length)


def _shares(graph: Graph, axis: _Axis, numbers: Value, positions: Value) -> Value:
    """Return the share of the pixels at `positions` in the resized pixels of these numbers, float64."""
    begin, end = _reach(axis, numbers)
    is_inside = (positions < end) & graph.node("GreaterOrEqual", positions, begin)
    inverse = _inverse(graph, axis.scale.maximum(1.0))
    distance = graph.node("Abs", (positions.to(np.float64) - _centers(axis, numbers) + 0.5) * inverse)
    weights = graph.where(is_inside, _bicubic(graph, distance), 0.0)
    return weights / weights.sum(1, keepdims=True)


def _inverse(graph: Graph, value: Value) -> Value:
    return graph.node("Div", 1.0, value)


def _bicubic(graph: Graph, x: Value) -> Value:
    """Return the bicubic filter with a = -0.5 at distances x >= 0."""
    near = (x * 1.5 - 2.5) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return graph.where(x < 1.0, near, graph.where(x < 2.0, far, 0.0))


def _whole(graph: Graph, weights: Value, unit: Value) -> Value:
    """Return weights as whole numbers of 1 / unit, rounded away from zero."""
    return (graph.node("Abs", weights) * unit + 0.5).floor() * graph.node("Sign", weights)


def _to_8_bit(x: Value, unit: Value) -> Value:
    return ((x + unit / 2.0) / unit).floor().clip(0.0, 255.0)


def _input(graph: Graph, stored_CSS: Value, transform: ImageTransform) -> Value:
    """Crop the margin, resize to T, convert to gray if the model is, and normalize; float32 (1, C, T, T)."""
    preprocess, dtype = transform.preprocess, transform.form.dtype
    kept = center_crop(torch.arange(transform.stored_size).expand(transform.stored_size, -1), transform.crop)[0]
    bounds = [np.array([int(bound)] * 2, np.int64) for bound in (kept[0], kept[-1] + 1)]
    x_CSS = graph.node("Slice", stored_CSS, *bounds, np.array([1, 2], np.int64))
    x_CSS = x_CSS * np.array(_in_255(dtype), np.float32)
    if len(kept) != preprocess.image_size:
        x_CSS = _resize(graph, x_CSS, len(kept), preprocess.image_size, clamp=dtype != "float32")
    if len(preprocess.mean) == 1 and transform.form.channels == RGB.channels:
        x_CSS = (x_CSS * np.array(GRAY_WEIGHTS, np.float32).reshape(-1, 1, 1)).sum(0, keepdims=True)
    mean, std = (
        (np.array(values, np.float32) * np.float32(255)).reshape(-1, 1, 1)
        for values in (preprocess.mean, preprocess.std)
    )
    return graph.node("Unsqueeze", (x_CSS - mean) / std, np.array([0], np.int64))


def _in_255(dtype: str) -> float:
    return {"uint8": 1.0, "uint16": 1 / WHITE_16_BIT, "float32": 255.0}[dtype]


def _resize(graph: Graph, x: Value, stored: int, side: int, *, clamp: bool) -> Value:
    """Resize by the weights of `Preprocess.fit`, which are constants, because both sizes are."""
    weights = resize_weights(stored, side)
    resized = graph.constant(weights) @ x @ graph.constant(weights.T)
    return resized.clip(*_levels(255)) if clamp else resized


def resize_weights(stored: int, side: int) -> NDArray[Any]:
    """Return the share of each stored pixel in each pixel of the input, float32 (T, S), by resizing the identity."""
    identity = torch.eye(stored)[None, None]
    resized = F.interpolate(identity, (side, stored), mode="bicubic", antialias=True)
    weights: NDArray[Any] = resized[0, 0].numpy()
    return weights


def _levels(white: float) -> tuple[NDArray[Any], NDArray[Any]]:
    return np.array(0, np.float32), np.array(white, np.float32)
