"""The targets of a dataset: what each image is labeled with, and the names of it.

Legend: N images, C classes, K numbers, S side of a mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from petune.base.errors import DataError
from petune.base.text import format_number, plural

TargetKind = Literal["class", "multi_hot", "number", "mask"]
"""One class an image; several; one or several numbers; a class for each pixel."""
CHUNK = 256
"""Masks that are checked at a time; bounds the memory."""
DIMENSIONS: dict[TargetKind, int] = {"class": 1, "multi_hot": 2, "number": 2, "mask": 3}


@dataclass(frozen=True)
class Target:
    """Kind and names of the targets.

    Attributes:
        kind: `class`: int64 (N,), from 0 to C - 1. `multi_hot`: uint8 (N, C), 0 or 1. `number`: float64 (N, K).
            `mask`: uint8 (N, S, S), from 0 to C - 1.
        names: Names of the classes (class, multi_hot, mask) or of the numbers (number), in order.
        ignore_index: Mask only: pixels of this value count neither in the loss nor in metrics.
    """

    kind: TargetKind
    names: tuple[str, ...]
    ignore_index: int = 255

    def __post_init__(self) -> None:
        """Check the kind.

        Raises:
            DataError: There is no such kind.
        """
        if self.kind not in DIMENSIONS:
            raise DataError(f"targets of kind {self.kind!r}. Use {', '.join(map(repr, DIMENSIONS))}")

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; empty for numbers."""
        return () if self.kind == "number" else self.names

    def check(self, targets: NDArray[Any], where: str) -> None:
        """Check the shape and the values of targets.

        Args:
            targets: See `kind`.
            where: What has these targets, for the message: `pets/train`.

        Raises:
            DataError: They are of another shape, out of range, NaN or infinite.
        """
        if targets.ndim != DIMENSIONS[self.kind]:
            raise DataError(
                f"{where}: targets of kind {self.kind!r} have {plural(DIMENSIONS[self.kind], 'dimension')}, "
                f"not shape {targets.shape}"
            )
        if targets.dtype.kind not in ("biu" if self.kind != "number" else "biuf"):
            raise DataError(f"{where}: targets of kind {self.kind!r} cannot be of type {targets.dtype}")
        if not len(targets):
            return
        if self.kind == "class":
            self._check_range(int(targets.min()), int(targets.max()), where)
        elif self.kind == "mask":
            self._check_masks(targets, where)
        elif targets.shape[1] != len(self.names):
            raise DataError(
                f"{where}: {plural(targets.shape[1], 'column')} of targets, but {plural(len(self.names), 'name')}"
            )
        elif self.kind == "multi_hot":
            if not np.isin(targets, (0, 1)).all():
                raise DataError(f"{where}: multi_hot targets hold other values than 0 and 1")
        else:
            self._check_finite(targets, where)

    def text(self, value: Any) -> str:
        """Return the target of one image for people: its class, labels or numbers; empty for a mask.

        Args:
            value: A row of the targets.
        """
        if self.kind == "mask":
            return ""
        if self.kind == "class":
            return self.names[int(value)]
        if self.kind == "multi_hot":
            return ", ".join(self.names[i] for i in np.flatnonzero(value)) or "none"
        return ", ".join(f"{name} {format_number(number)}" for name, number in zip(self.names, value, strict=True))

    def absent(self, targets: NDArray[Any]) -> list[str]:
        """Return the classes that no image has; only for targets of kind class and multi_hot."""
        if self.kind == "class":
            counts = np.bincount(targets, minlength=len(self.names))
        elif self.kind == "multi_hot":
            counts = targets.sum(0, dtype=np.int64)
        else:
            return []
        return [self.names[i] for i in np.flatnonzero(counts == 0)]

    def _check_range(self, smallest: int, largest: int, where: str) -> None:
        if smallest < 0 or largest >= len(self.names):
            raise DataError(f"{where}: labels are {smallest}..{largest}, outside 0..{len(self.names) - 1}")

    def _check_masks(self, masks: NDArray[Any], where: str) -> None:
        for start in range(0, len(masks), CHUNK):
            chunk = np.asarray(masks[start : start + CHUNK])
            counted = chunk[chunk != self.ignore_index]
            if counted.size:
                self._check_range(int(counted.min()), int(counted.max()), where)

    def _check_finite(self, targets: NDArray[Any], where: str) -> None:
        wrong = np.argwhere(~np.isfinite(targets))
        if len(wrong):
            row, column = wrong[0]
            raise DataError(
                f"{where}: {plural(len(wrong), 'target')} not finite, the first in image {row}: "
                f"{self.names[column]} is {targets[row, column]}. Remove these images, or correct the numbers"
            )
