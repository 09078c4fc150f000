"""Put train and val together, for a final training on both.

Legend: N images.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from petune.data.dataset import Dataset, Images, RandomClips, Split


@dataclass(frozen=True)
class JoinedImages:
    """The images of one array, then those of another; rows count on.

    Attributes:
        first, second: Images of the same size and type.
    """

    first: Images
    second: Images

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, H, W, C)."""
        return (len(self), *self.first.shape[1:])

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of a pixel."""
        return self.first.dtype

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def __getitem__(self, rows: Any) -> Any:
        """Return the images of these rows: a slice, or an array of row numbers."""
        rows_N = np.arange(len(self))[rows]
        if rows_N.ndim == 0:
            return self.first[rows_N] if rows_N < len(self.first) else self.second[rows_N - len(self.first)]
        out = np.empty((len(rows_N), *self.shape[1:]), self.dtype)
        in_first = rows_N < len(self.first)
        out[in_first] = self.first[rows_N[in_first]]
        out[~in_first] = self.second[rows_N[~in_first] - len(self.first)]
        return out


@dataclass(frozen=True)
class JoinedClips(JoinedImages):
    """The clips of videos, then those of others."""

    def draw(self, rows: NDArray[np.int64], seeds: NDArray[np.int64]) -> NDArray[Any]:
        """Return random clips of these rows; see `RandomClips`."""
        out = np.empty((len(rows), *self.shape[1:]), self.dtype)
        in_first = rows < len(self.first)
        for images, chosen, offset in ((self.first, in_first, 0), (self.second, ~in_first, len(self.first))):
            assert isinstance(images, RandomClips)
            if chosen.any():
                out[chosen] = images.draw(rows[chosen] - offset, seeds[chosen])
        return out


def merge_val(dataset: Dataset) -> Dataset:
    """Return the dataset with the images of val in train, after those of train, and an empty val split."""
    train, val = dataset.train, dataset.val
    if not len(val):
        return dataset
    shared = train.images is val.images
    offset = 0 if shared else len(train.images)
    if train.has_masks:  # masks go by rows, as images do
        targets = train.targets if shared else np.concatenate([train.targets, val.targets])
    else:
        targets = np.concatenate([train.targets, val.targets])
    merged = Split(
        images=train.images if shared else _joined_images(train.images, val.images),
        targets=targets,
        rows=np.concatenate([train.rows, val.rows + offset]),
        crop=train.crop,
        weights=_joined_weights(train, val),
        groups=joined(train.groups, val.groups),
        names=joined(train.names, val.names),
    )
    return replace(dataset, train=merged, val=val.take(np.arange(0)))


def _joined_images(first: Images, second: Images) -> Images:
    has_videos = isinstance(first, RandomClips) and isinstance(second, RandomClips)
    return (JoinedClips if has_videos else JoinedImages)(first, second)


def joined(*parts: NDArray[Any] | None) -> NDArray[Any] | None:
    """Return what is known of the images of several splits, in one array; None if it is not known of one."""
    known = [part for part in parts if part is not None]
    return np.concatenate(known) if len(known) == len(parts) else None


def _joined_weights(train: Split, val: Split) -> NDArray[np.float64] | None:
    if train.weights is None and val.weights is None:
        return None
    return np.concatenate([np.ones(len(part)) if part.weights is None else part.weights for part in (train, val)])
