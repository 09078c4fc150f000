"""The preprocessing of a trained model as an ONNX graph: from an image of any size to the model's input.

It computes what Pillow computes, in its order and its integers: bicubic with antialiasing, after a reduction of large
images by a whole factor, with rounding to 8 bits after each step. So the pixels are those that `petune.predict` sees.

Legend: H height, W width, C channels, S side of a stored image, T side of the model's input, M side after reduction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from petune.data.bands import RGB
from petune.data.preprocess import GRAY_WEIGHTS, WHITE_16_BIT, center_crop
from petune.serving.export.onnx_graph import Graph, Value
from petune.serving.image_transform import ImageTransform

if TYPE_CHECKING:
    import onnx

IMAGE = "image"
REDUCING_GAP = 3
"""As in `center_square`: an image is first reduced by a whole factor, to at least three times the final side."""
SUPPORT = 2.0
"""Of the bicubic filter, in pixels of the smaller image."""
PRECISION = float(1 << 22)
"""Pillow's weights for 8 bits are whole numbers of this fraction."""
SHIFT = float(1 << 24)
"""Pillow divides the sums of reduced pixels by a multiplication and a shift by 24 bits."""


@dataclass(frozen=True)
class _Axis:
    """The part of an axis of the image that the square is computed from.

    Attributes:
        low, high: First pixel, and the one after the last.
        factor: How many pixels are reduced to one.
        size: M.
        box: Begin and end of the square, in reduced pixels; Pillow keeps them as float32.
    """

    low: Value
    high: Value
    factor: Value
    size: Value
    box: tuple[Value, Value]


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
    """Return the center square of an image at S pixels, (C, S, S): see `center_square` and `bands_square`."""
    shape = graph.node("Shape", image_HWC)
    height, width = (graph.node("Gather", shape, axis) for axis in (0, 1))
    edge = height.minimum(width)
    factor = (edge / (REDUCING_GAP * side)).maximum(1) if is_rgb else graph.constant(np.array(1))
    rows, columns = (_axis(length, edge, factor, side) for length in (height, width))
    x_HWC = _crop(graph, image_HWC, rows, columns)
    x_CMM = (_reduce(graph, x_HWC, rows, columns) if is_rgb else x_HWC.to(np.float64)).transpose(2, 0, 1)
    rows_SM, columns_SM = (_weights(graph, axis, side) for axis in (rows, columns))
    if is_rgb:
        x_CMS = _to_8_bit(x_CMM @ _whole(graph, columns_SM).transpose(1, 0))
        return _to_8_bit(_whole(graph, rows_SM) @ x_CMS).to(np.float32)
    x_CMS = (x_CMM @ columns_SM.transpose(1, 0)).to(np.float32).to(np.float64)
    x_CSS = (rows_SM @ x_CMS).to(np.float32)
    return x_CSS if dtype == "float32" else graph.node("Round", x_CSS).clip(*_levels(np.iinfo(dtype).max))


def _axis(length: Value, edge: Value, factor: Value, side: int) -> _Axis:
    """Find the pixels that the square depends on, as Pillow does before it reduces an image."""
    exact = edge.to(np.float64)
    begin = (length.to(np.float64) - exact) / 2.0
    end = begin + exact
    support = _support(exact / float(side), factor)
    low = (begin - support).to(np.int64).maximum(0)
    high = length.graph.node("Ceil", end + support).to(np.int64).minimum(length)
    by = factor.to(np.float64)
    first, last = (((bound - low.to(np.float64)) / by).to(np.float32) for bound in (begin, end))
    return _Axis(low, high, factor, (high - low + factor - 1) / factor, (first, last))


def _support(scale: Value, factor: Value) -> Value:
    """Return how many pixels around the square count; before a reduction, Pillow takes half a reduced pixel less."""
    return scale.graph.where(factor < 2, scale.maximum(1.0) * SUPPORT, scale * (SUPPORT - 0.5))


def _crop(graph: Graph, image_HWC: Value, rows: _Axis, columns: _Axis) -> Value:
    one = np.array([1], np.int64)
    starts, ends = (
        graph.node("Concat", *(graph.node("Reshape", value, one) for value in values), axis=0)
        for values in ((rows.low, columns.low), (rows.high, columns.high))
    )
    return graph.node("Slice", image_HWC, starts, ends, np.array([0, 1], np.int64))


def _reduce(graph: Graph, x_HWC: Value, rows: _Axis, columns: _Axis) -> Value:
    """Return the mean of each block of pixels, float64 (M, M, C); blocks at the end may have fewer."""
    factor, channels = rows.factor, RGB.channels
    missing = [axis.size * axis.factor - (axis.high - axis.low) for axis in (rows, columns)]
    one = np.array([1], np.int64)
    ends = (graph.node("Reshape", value, one) for value in missing)
    padding = graph.node("Concat", np.zeros(3, np.int64), *ends, np.zeros(1, np.int64), axis=0)
    padded = graph.node("Pad", x_HWC.to(np.float32), padding)
    sums_MMC = padded.reshape(rows.size, factor, columns.size, factor, channels).sum(1, 3).to(np.float64)
    counts = [(axis.high - axis.low - graph.arange(axis.size) * factor).minimum(factor) for axis in (rows, columns)]
    count_MM1 = (counts[0].reshape(-1, 1, 1) * counts[1].reshape(1, -1, 1)).to(np.float64)
    multiplier_MM1 = graph.node("Div", SHIFT, count_MM1).to(np.float32).to(np.float64).floor()
    return ((sums_MMC + (count_MM1 / 2.0).floor()) * multiplier_MM1 / SHIFT).floor()


def _weights(graph: Graph, axis: _Axis, side: int) -> Value:
    """Return the share of each pixel of an axis in each pixel of the square, float64 (S, M)."""
    first = axis.box[0].to(np.float64)
    scale = (axis.box[1] - axis.box[0]).to(np.float64) / float(side)
    stretch = scale.maximum(1.0)
    support = stretch * SUPPORT
    center_S1 = scale * (np.arange(side)[:, None] + 0.5) + first
    begin_S1 = (center_S1 - support + 0.5).to(np.int64).maximum(0)
    end_S1 = (center_S1 + support + 0.5).to(np.int64).minimum(axis.size)
    position_M = graph.arange(axis.size)
    is_inside = (position_M < end_S1) & graph.node("GreaterOrEqual", position_M, begin_S1)
    distance_SM = graph.node("Abs", (position_M.to(np.float64) - center_S1 + 0.5) * _inverse(graph, stretch))
    weights_SM = graph.where(is_inside, _bicubic(graph, distance_SM), 0.0)
    return weights_SM / weights_SM.sum(1, keepdims=True)


def _inverse(graph: Graph, value: Value) -> Value:
    return graph.node("Div", 1.0, value)


def _bicubic(graph: Graph, x: Value) -> Value:
    """Return the bicubic filter with a = -0.5 at distances x >= 0."""
    near = (x * 1.5 - 2.5) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return graph.where(x < 1.0, near, graph.where(x < 2.0, far, 0.0))


def _whole(graph: Graph, weights: Value) -> Value:
    """Return weights as whole numbers of 1 / PRECISION, rounded away from zero."""
    return (graph.node("Abs", weights) * PRECISION + 0.5).floor() * graph.node("Sign", weights)


def _to_8_bit(x: Value) -> Value:
    return ((x + PRECISION / 2) / PRECISION).floor().clip(0.0, 255.0)


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
