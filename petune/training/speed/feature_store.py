"""What a frozen prefix makes of the images of a split, on disk: complete up to a mark, whatever happens meanwhile.

Legend: B batch, N images.
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
from petune.data.batches import to_device

Kind = tuple[tuple[int, ...], torch.dtype]
"""Shape of one image's value and its dtype."""

MARK = "mark.json"


class Store:
    """Values of N images, one memory-mapped file for each kind of value.

    Args:
        directory: Made now; what another key has left there is thrown away.
        key: All that the values depend on.
        count: N.
        kinds: What there is of each image.

    Raises:
        OSError: The directory cannot be written, or has no room.
    """

    def __init__(self, directory: Path, key: str, count: int, kinds: Sequence[Kind]) -> None:
        self.directory, self.key, self.count, self.kinds = directory, key, count, tuple(kinds)
        self.done = self._marked()
        if not self.done:
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
        self._rows = [self._map(number, kind) for number, kind in enumerate(self.kinds)]

    def write(self, start: int, values: Sequence[Tensor]) -> None:
        """Put in the values, (B, …) each, of the images from `start` on."""
        for rows, value, (shape, dtype) in zip(self._rows, values, self.kinds, strict=True):
            if tuple(value.shape[1:]) != shape or value.dtype != dtype:
                raise ValueError(
                    f"a value of shape {shape} and {dtype} was to be kept, not {value.shape} {value.dtype}"
                )
            plain = value.detach().to("cpu").contiguous().reshape(len(value), -1).view(torch.uint8)
            rows[start : start + len(value)] = plain.numpy()

    def mark(self, done: int) -> None:
        """All images before `done` are in: what is written is synced first, so the mark never promises too much."""
        for rows in self._rows:
            rows.flush()
        replace_file(self.directory / MARK, json.dumps({"key": self.key, "done": done}).encode())
        self.done = done

    def read(self, positions: NDArray[np.int64], device: torch.device) -> list[Tensor]:
        """The values of these images, (B, …) each, on the device."""
        values = []
        for rows, (shape, dtype) in zip(self._rows, self.kinds, strict=True):
            raw = torch.from_numpy(np.ascontiguousarray(rows[positions])).view(dtype)
            values.append(to_device(raw.reshape(len(positions), *shape), device))
        return values

    def _marked(self) -> int:
        try:
            mark = json.loads((self.directory / MARK).read_bytes())
            whole = all((self.directory / f"{n}.bin").stat().st_size == self._size(k) for n, k in enumerate(self.kinds))
            return int(mark["done"]) if whole and mark["key"] == self.key else 0
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    def _size(self, kind: Kind) -> int:
        return self.count * bytes_of(kind)

    def _map(self, number: int, kind: Kind) -> np.memmap[Any, np.dtype[np.uint8]]:
        path = self.directory / f"{number}.bin"
        if not path.exists():
            with path.open("wb") as file:
                # room is taken now: writing to a mapped file on a full disk ends the process (SIGBUS)
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, self._size(kind))
                else:
                    file.truncate(self._size(kind))
        return np.memmap(path, np.uint8, "r+", shape=(self.count, bytes_of(kind)))


def bytes_of(kind: Kind) -> int:
    """Of one image's value."""
    return torch.Size(kind[0]).numel() * kind[1].itemsize
