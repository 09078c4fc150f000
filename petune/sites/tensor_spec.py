"""One tensor among the inputs of a model: shape and kind of its values, enough to make others like it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MAX_RUNS = 4096
"""Integers with more changes of value than this are content, such as the pixels of an image; fewer are kept."""

MAX_COLUMNS = 4
"""Largest number of first columns that are positions; pixels that are whole numbers have more."""

Fill = Callable[[tuple[int, ...]], Tensor]
"""Makes floating-point values of a shape."""
Runs = tuple[tuple[float, int], ...]
"""Values, each with the number of times that it follows in a row."""


@dataclass(frozen=True)
class TensorSpec:
    """One tensor that a forward takes.

    Floating-point values are content: other tensors get others. Integers, booleans and masks are kept, because a model
    may rely on them: positions, sizes, token ids, which patches are padding. So are the first columns of a list of
    vectors if they alone hold whole numbers, such as the row and column of a patch before its pixels (Pix2Struct).

    Attributes:
        shape: Of one sample, with its batch dimension: (1, channels, height, width).
        batch_dim: Dimension along which samples are joined; None for a tensor that all samples share.
        dtype: None is floating point, in the model's own dtype.
        values: Those that are kept; empty for content.
        low, high: Range of integers that are content.
        columns: Number of columns that are kept; the others are content. 0 keeps all values, or none.
    """

    shape: tuple[int, ...]
    batch_dim: int | None = 0
    dtype: torch.dtype | None = None
    values: Runs = ()
    low: int = 0
    high: int = 0
    columns: int = 0

    @classmethod
    def of(cls, tensor: Tensor, batch_dim: int | None, num_samples: int, *, is_mask: bool = False) -> TensorSpec:
        """Describe the first of the samples in a tensor.

        Args:
            tensor: Values of all samples.
            batch_dim: See `TensorSpec`.
            num_samples: Number of samples; it divides the size of `batch_dim`.
            is_mask: Keep floating-point values.
        """
        first = tensor.detach()
        if batch_dim is not None:
            first = first.narrow(batch_dim, 0, first.shape[batch_dim] // num_samples)
        shape = tuple(first.shape)
        dtype = None if first.is_floating_point() else first.dtype
        if first.is_meta or first.is_complex():
            return cls(shape, batch_dim, dtype)
        columns = 0 if dtype is not None or is_mask else _whole_columns(first)
        if dtype is None and not is_mask and not columns:
            return cls(shape, batch_dim, dtype)
        kept = first[..., :columns] if columns else first
        runs = tuple((value, len(list(equal))) for value, equal in itertools.groupby(kept.flatten().tolist()))
        if len(runs) <= MAX_RUNS:
            return cls(shape, batch_dim, dtype, values=runs, columns=columns)
        return cls(shape, batch_dim, dtype, *(() if dtype is None else ((), int(first.min()), int(first.max()))))

    def batch(self, num_samples: int, fill: Fill) -> Tensor:
        """Return this tensor for a number of samples.

        Args:
            num_samples: Number of samples.
            fill: Makes the content.
        """
        count = 1 if self.batch_dim is None else num_samples
        whole = self.values and not self.columns
        samples = self._kept(self.shape) if whole else self._content((count, *self.shape), fill)
        if whole:
            samples = samples.expand(count, *self.shape)
        elif self.columns:
            samples[..., : self.columns] = self._kept((*self.shape[:-1], self.columns)).to(samples)
        if self.batch_dim is None:
            return samples[0].clone()
        return torch.cat(list(samples), dim=self.batch_dim)

    def _kept(self, shape: tuple[int, ...]) -> Tensor:
        values, counts = zip(*self.values, strict=True)
        runs = torch.tensor(values, dtype=self.dtype or torch.get_default_dtype(), device="cpu")
        return runs.repeat_interleave(torch.tensor(counts, device="cpu")).reshape(shape)

    def _content(self, shape: tuple[int, ...], fill: Fill) -> Tensor:
        filled = fill(shape)
        if self.dtype is None or self.dtype.is_complex:
            return filled if self.dtype is None else filled.to(self.dtype)
        share = (filled.abs() * 997).frac()  # of the range
        return (self.low + (share * (self.high - self.low + 1)).floor()).to(self.dtype)

    def num_samples_in(self, tensor: Tensor) -> int | None:
        """Return how many samples a tensor holds; None if all samples share it."""
        if self.batch_dim is None or tensor.ndim != len(self.shape):
            return None
        return int(tensor.shape[self.batch_dim]) // max(self.shape[self.batch_dim], 1)

    def select(self, tensor: Tensor, samples: list[int]) -> Tensor:
        """Return those samples of a tensor, in that order."""
        if self.batch_dim is None:
            return tensor
        if self.shape[self.batch_dim] == 1:
            return tensor.index_select(self.batch_dim, torch.tensor(samples, device=tensor.device))
        parts = torch.split(tensor, max(self.shape[self.batch_dim], 1), dim=self.batch_dim)
        return torch.cat([parts[sample] for sample in samples], dim=self.batch_dim)

    def __str__(self) -> str:
        kind = "" if self.dtype is None else f" ({str(self.dtype).removeprefix('torch.')})"
        return f"{'x'.join(map(str, self.shape)) or 'a number'}{kind}"

    def to_json(self) -> dict[str, Any]:
        """Return this as plain data."""
        data: dict[str, Any] = {"shape": list(self.shape), "batch_dim": self.batch_dim}
        if self.dtype is not None:
            data["dtype"] = str(self.dtype).removeprefix("torch.")
        if self.values:
            data["values"] = [[_plain(value), count] for value, count in self.values]
            data |= {"columns": self.columns} if self.columns else {}
        elif self.dtype is not None:
            data |= {"low": self.low, "high": self.high}
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TensorSpec:
        """Read what `to_json` wrote.

        Raises:
            KeyError, TypeError, ValueError: It has another form.
        """
        dtype = getattr(torch, data["dtype"], None) if "dtype" in data else None
        if "dtype" in data and not isinstance(dtype, torch.dtype):
            raise ValueError(f"no such dtype: {data['dtype']}")
        shape = tuple(int(size) for size in data["shape"])
        batch_dim = None if data["batch_dim"] is None else int(data["batch_dim"])
        if min(shape, default=1) < 0 or (batch_dim is not None and not 0 <= batch_dim < len(shape)):
            raise ValueError(f"no shape with batch dimension {batch_dim}: {shape}")
        runs = [(float(value) if isinstance(value, str) else value, int(n)) for value, n in data.get("values", ())]
        numbers = (int(data.get(name, 0)) for name in ("low", "high", "columns"))
        return cls(shape, batch_dim, dtype, tuple(runs), *numbers)


def _whole_columns(x: Tensor) -> int:
    """Return how many first columns of (1, N, C) vectors hold whole numbers that differ, if the others do not."""
    if x.ndim != 3 or not x.numel():
        return 0
    is_whole_C = (x == x.round()).flatten(0, 1).all(0)
    columns = int(is_whole_C.long().cumprod(0).sum())
    kept = x[..., :columns]
    return columns if 0 < columns <= MAX_COLUMNS and is_whole_C.sum() == columns and kept.min() != kept.max() else 0


def _plain(value: float) -> float | str:
    """Return a value for JSON, which has no infinity."""
    return value if math.isfinite(value) else str(value)
