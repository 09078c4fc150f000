"""Find the grid of patches that enters the first block, and the tokens before it."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from petune.sites.forward import device_of, dtype_of, forward_of, inference, meta_output, tensors_in
from petune.sites.hooked import removed_after
from petune.sites.input_spec import Inputs, InputSpec
from petune.sites.layouts import IMAGES, channel_axis, is_conv
from petune.sites.trace import Call, Trace
from petune.sites.windows import are_windows

LOG = logging.getLogger(__name__)

MAX_PREFIX = 64
"""More tokens than this before the patches are taken for something else."""

Grid = tuple[int, ...]
"""Rows and columns of patches; of a video that is cut into tubelets their number in time first."""


def grid_and_prefix(model: nn.Module, trace: Trace, first: Call | None, spec: InputSpec) -> tuple[Grid | None, int]:
    """Return rows and columns of patches where the first block is entered, and the number of tokens before them.

    Args:
        model: The model.
        trace: One forward of it.
        first: The call that enters the first block; None without blocks.
        spec: What the model takes.
    """
    if first is None or first.input is None:
        return None, 0
    x = first.input
    if x.is_nested or x.ndim == 2:  # each image has a grid of its own
        return None, 0
    if x.ndim in IMAGES and _batch_is_inside(model, trace, first, spec):
        return None, 0
    if x.ndim in IMAGES and is_widened(first):
        grid, num_prefix_tokens = _fitting_grid(trace, first, spec)
        return (grid, num_prefix_tokens) if num_prefix_tokens >= 0 and len(x) == trace.batch_size else (None, 0)
    if x.ndim in IMAGES:
        shape = tuple(x.shape[2:] if channel_axis(first) == 1 else x.shape[1:-1])
        maps = [grid for _, grid in _image_grids(_matrices_before(trace, first))]
        return (None if are_windows(trace, first, shape, maps, spec) else shape), 0
    grid, num_prefix_tokens = _fitting_grid(trace, first, spec)
    stated = _stated_prefix(model)
    if num_prefix_tokens in {0, 1, stated}:
        return grid, num_prefix_tokens
    measured = _measured_prefix(model, first.module, spec)
    if measured is None:
        return grid, (stated or 0) if grid is None else num_prefix_tokens
    return (grid if measured == num_prefix_tokens else None), measured


def _batch_is_inside(model: nn.Module, trace: Trace, first: Call, spec: InputSpec) -> bool:
    """Return whether more samples make another axis than the first longer: tokens are (time, batch, patches, width)."""
    assert first.input is not None
    shape, doubled = first.input.shape, _shape_of_batch(model, first, spec, 2 * trace.batch_size)
    return doubled is not None and doubled[1:] != shape[1:]


class _Entered(Exception):
    """Ends a forward at a block: what follows does not matter."""


def _shape_of_batch(model: nn.Module, block: Call, spec: InputSpec, num_samples: int) -> torch.Size | None:
    """Return the shape of what enters a block with so many samples; None if the model does not run on them."""
    shapes: list[torch.Size] = []

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        shapes.append(next(tensors_in((args, kwargs))).shape)
        raise _Entered

    handle = block.module.register_forward_pre_hook(enter, with_kwargs=True)
    is_on_meta = block.input is not None and block.input.device.type == "meta" != device_of(model).type
    try:
        with removed_after([handle]):
            if is_on_meta:
                meta_output(model, spec, num_samples)
            else:
                forward_of(model, spec.zeros(num_samples))
    except _Entered:
        pass
    except Exception:  # whatever the model's own code raises
        LOG.debug("the model does not run on %d samples", num_samples, exc_info=True)
    return shapes[0] if shapes else None


def is_widened(block: Call) -> bool:
    """Return whether what enters a block is a stream of several lanes (hyper-connections), of which layers read a mix.

    No layer in the block then takes as many values as enter it.
    """
    x = block.input
    taken = [c.input.numel() for c in block.inner() if c.has_matrix and c.input is not None and c.input.ndim > 2]
    return x is not None and bool(taken) and all(x.numel() % n == 0 and n < x.numel() for n in taken)


def _stated_prefix(model: nn.Module) -> int | None:
    """Return the number of prefix tokens that a model of timm states."""
    stated: Any = next((m.num_prefix_tokens for m in model.modules() if hasattr(m, "num_prefix_tokens")), None)
    return None if stated is None else int(stated)


def _fitting_grid(trace: Trace, first: Call, spec: InputSpec) -> tuple[Grid | None, int]:
    """Return the grid made before the first block that leaves the fewest tokens over, and how many those are.

    Several branches make grids of their own (CrossViT), of which one enters the first block.
    """
    before = _matrices_before(trace, first)
    for grids in (_image_grids(before), _token_grids(before, spec)):
        fitting = [(left_over, grid) for images, grid in grids if (left_over := _left_over(first, images, grid)) >= 0]
        if fitting:
            left_over, grid = min(fitting, key=lambda fit: fit[0])
            if left_over <= MAX_PREFIX:
                return grid, left_over
    return None, -1


def _matrices_before(trace: Trace, first: Call) -> list[Call]:
    return [c for c in trace.calls if c.has_matrix and c.stop < first.start and c.output is not None]


def _left_over(first: Call, num_images: int, grid: Grid) -> int:
    """Return how many tokens of a row of the first block are not patches of a grid; negative if it does not fit.

    A row may hold several frames of a video, or all images of a batch. A row that holds a part of an image, a window,
    is compared with the grid itself.
    """
    assert first.input is not None
    num_rows = min(num_images, len(first.input))
    if num_rows == 0:  # an empty tensor, such as YOLOS' positions between its layers when it has one layer
        return -1
    num_patches, rest = divmod(num_images * math.prod(grid), num_rows)
    return -1 if rest else first.input.shape[1] - num_patches


def _image_grids(before: list[Call]) -> Iterator[tuple[int, Grid]]:
    """Yield the grids that convolutions make, the last first, each with its number of images."""
    for call in reversed(before):
        y = call.output
        is_volume = y is not None and y.ndim == 5 and math.prod(y.shape[2:]) > 1  # not one patch for each row
        if y is not None and (y.ndim == 4 or is_volume) and is_conv(call):
            yield len(y), tuple(y.shape[2:])


def _token_grids(before: list[Call], spec: InputSpec) -> Iterator[tuple[int, Grid]]:
    """Yield the grids of the tokens that matrices make, the last first, with the image's ratio of sides.

    Tokens in a row have the grid of that ratio, if there is one; those in rows and columns have these.
    """
    if not spec.is_image:
        return
    _, height, width = spec.size
    for call in reversed(before):
        y = call.output
        rows = round(math.sqrt(y.shape[1] * height / width)) if y is not None and y.ndim == 3 else 0
        if y is not None and rows and y.shape[1] % rows == 0:
            yield len(y), (rows, y.shape[1] // rows)
        elif y is not None and y.ndim == 4 and not is_conv(call) and _has_ratio(tuple(y.shape[1:3]), height, width):
            yield len(y), tuple(y.shape[1:3])


def _has_ratio(grid: Grid, height: int, width: int) -> bool:
    rows, columns = grid
    return abs(rows * width - columns * height) <= max(height, width)  # rounding changes a side by less than one


def _measured_prefix(model: nn.Module, block: nn.Module, spec: InputSpec) -> int | None:
    """Return the number of leading tokens of a block's input that do not depend on the image: class token, registers.

    None if the weights do not tell: they are on the meta device, or zero. 0 if the model does not run on one image.
    """
    device = device_of(model)
    if device.type == "meta":
        return None
    images = [spec.noise(1, seed).to(device, dtype_of(model)) for seed in range(2)]
    try:
        x_ND, y_ND = (_block_input(model, block, image).flatten(0, -2) for image in images)
    except Exception:  # whatever the model's own code raises on noise
        LOG.debug("the model does not run on noise", exc_info=True)
        return 0
    tolerance = 1e-5 * float(x_ND.detach().abs().max())
    is_fixed = ((x_ND - y_ND).abs() <= tolerance).all(-1)
    return None if bool(is_fixed.all()) else int(is_fixed.int().cumprod(0).sum())


def _block_input(model: nn.Module, block: nn.Module, image: Inputs) -> Tensor:
    entered: list[Tensor] = []

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        entered.append(next(tensors_in((args, kwargs))))

    handle = block.register_forward_pre_hook(enter, with_kwargs=True)
    with removed_after([handle]), inference(model):
        torch.manual_seed(0)  # the same random masks for both images
        image.call(model)
    return entered[0]
