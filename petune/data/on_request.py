"""Images that are decoded each time they are read, for datasets that do not fit the cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from petune.data.dataset import Split
from petune.data.images import num_threads
from petune.data.video.clips import Clips
from petune.data.workers import image_workers

ReadRow = Callable[[int], NDArray[Any]]
"""Decodes the image of a row, (S, S, C), to the same pixels each time; called from several threads."""


@dataclass(frozen=True)
class OnRequest:
    """Images by row, decoded when they are read.

    Attributes:
        read: See `ReadRow`.
        shape: (N, S, S, C).
        dtype: Type of a pixel.
    """

    read: ReadRow
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def __len__(self) -> int:
        """Return N."""
        return self.shape[0]

    def __getitem__(self, rows: Any) -> NDArray[Any]:
        """Return the images of these rows, or of one row, decoded on all cores.

        Raises:
            DataError: An image changed since it was checked, and cannot be decoded.
        """
        chosen = np.arange(len(self))[rows]
        if chosen.ndim == 0:
            return self.read(int(chosen))
        images = np.empty((len(chosen), *self.shape[1:]), self.dtype)
        if len(chosen) == 1:  # a thread that prepares one image starts no others
            images[0] = self.read(int(chosen[0]))
            return images
        with image_workers(num_threads()) as workers:
            for number, image in enumerate(workers.pool.map(self.read, chosen.tolist())):
                images[number] = image
        return images


def on_request_note(splits: Mapping[str, Split]) -> str:
    """Describe the splits that are not cached; empty if all are.

    Args:
        splits: By name.
    """
    names = [name for name, split in splits.items() if decodes(split)]
    return f"{' and '.join(names)} decoded in every epoch, because of cache_gb or the free disk space" if names else ""


def decodes(split: Split) -> bool:
    """Return True if reading the images of a split takes time: they are not in an array."""
    if isinstance(split.images, Clips):
        return split.images.frames is None
    return not isinstance(split.images, np.ndarray)


def scratch(shape: tuple[int, ...], dtype: Any = np.uint8) -> NDArray[Any]:
    """Return an array in which all images share their memory, to decode without keeping the pixels."""
    one = np.empty(shape[1:], dtype)
    return np.lib.stride_tricks.as_strided(one, shape, (0, *one.strides))
