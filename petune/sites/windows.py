"""Tell a map of an image from its windows: both have four dimensions, but windows are no rows and columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from petune.sites.input_spec import InputSpec
from petune.sites.trace import Call, Trace

MAX_STEPS = 16
"""Tensors before a block that are looked at."""


def are_windows(
    trace: Trace, first: Call, grid: tuple[int, ...], maps: Iterable[tuple[int, ...]], spec: InputSpec
) -> bool:
    """Return whether what enters a block is (window, place in it), as in NesT and MobileViT-V2, not (row, column).

    Args:
        trace: The forward.
        first: The block.
        grid: Two dimensions of its input, or three of a video's.
        maps: Rows and columns of what the convolutions before it return.
        spec: What the model takes.
    """
    if _is_cut(trace, first.input, grid):
        return True
    if grid in maps or not spec.is_image or len(grid) != 2:
        return False
    _, height, width = spec.size
    return abs(grid[0] * width - grid[1] * height) > max(height, width)  # rounding changes a side by less than one


def _is_cut(trace: Trace, x: Tensor | None, grid: tuple[int, ...]) -> bool:
    """Return whether tokens were reshaped from more dimensions, of which the grid's are products."""
    steps = [] if x is None else [x]
    for step in steps:
        sources = _sources(trace, step)
        if any(s.ndim > step.ndim and not _holds_in_a_row(s.shape, grid) for s in sources):
            return True
        steps += [s for s in sources if s.shape == step.shape and len(steps) < MAX_STEPS]
    return False


def _sources(trace: Trace, tensor: Tensor) -> list[Tensor]:
    """Return what a tensor was reshaped from, the operands that it is a sum or product of, or what a norm took."""
    maker = trace.maker(tensor)
    entered = maker.input if maker is not None and not any(c.has_matrix for c in maker.subtree()) else None
    operands = trace.elementwise.get(id(tensor), (tensor, ()))[1]
    reshaped = trace.reshaped.get(id(tensor), (tensor, None))[1]
    return [x for x in (entered, reshaped, *operands) if x is not None and x is not tensor]


def _holds_in_a_row(shape: Sequence[int], grid: tuple[int, ...]) -> bool:
    return any(tuple(shape[i : i + len(grid)]) == grid for i in range(len(shape)))
