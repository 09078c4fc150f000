"""Cached features of one split in one memory-mapped file, complete up to a mark.

Legend: B batch.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from petune.base.files import replace_file
from petune.data.preprocess import to_device
from petune.training.speed.frozen_prefix import Kind

DATA_FILE, MARK_FILE = "features.bin", "mark.json"


class FeatureStore:
    """The features of `count` images: one row of bytes per image.

    Args:
        directory: Created if it is missing; features with another key are deleted.
        key: Identifies everything that the features depend on.
        count: Number of images.
        kinds: Shape and dtype of each tensor per image.

    Attributes:
        done: Images before this one are complete.

    Raises:
        OSError: The directory cannot be written, or the disk is full.
    """

    def __init__(self, directory: Path, key: str, count: int, kinds: Sequence[Kind]) -> None:
        self.directory = directory
        self.key = key
        self.kinds = kinds
        self._widths = [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in kinds]
        self._shape = (count, sum(self._widths))
        self.done = self._read_mark()
        if not self.done:
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
            self._allocate()
        self._rows = np.memmap(directory / DATA_FILE, np.uint8, "r+", shape=self._shape)

    def write(self, start: int, values: Sequence[Tensor]) -> None:
        """Store the features (B, …) of the images from `start` on."""
        for value, kind in zip(values, self.kinds, strict=True):
            if (tuple(value.shape[1:]), value.dtype) != kind:
                raise ValueError(
                    f"features have shape {tuple(value.shape)} and {value.dtype}; expected (B, *) of {kind}"
                )
        rows = torch.cat([v.detach().cpu().reshape(len(v), -1).view(torch.uint8) for v in values], dim=1)
        self._rows[start : start + len(rows)] = rows.numpy()

    def mark(self, done: int) -> None:
        """Declare the images before `done` complete. They are synced first, so that a mark is always true."""
        self._rows.flush()
        replace_file(self.directory / MARK_FILE, json.dumps({"key": self.key, "done": done}).encode())
        self.done = done

    def read(self, positions: NDArray[np.int64], device: torch.device) -> list[Tensor]:
        """Return the features (B, …) of the images at these positions, on `device`."""
        rows = torch.from_numpy(np.ascontiguousarray(self._rows[positions]))
        values = []
        for columns, (shape, dtype) in zip(torch.split(rows, self._widths, dim=1), self.kinds, strict=True):
            value = columns.contiguous().view(dtype).reshape(len(rows), *shape)
            values.append(to_device(value, device))
        return values

    def _read_mark(self) -> int:
        try:
            mark: dict[str, Any] = json.loads((self.directory / MARK_FILE).read_bytes())
            complete = (self.directory / DATA_FILE).stat().st_size == self._shape[0] * self._shape[1]
            return int(mark["done"]) if complete and mark["key"] == self.key else 0
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    def _allocate(self) -> None:
        """Take the room on disk now: writing to a mapped file on a full disk kills the process (SIGBUS)."""
        size = self._shape[0] * self._shape[1]
        with (self.directory / DATA_FILE).open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
