"""Decode samples that another library yields, an image and a target each, once into the cache.

Legend: N samples, S side of a stored image in pixels.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from petune.base.errors import DataError
from petune.data.cache import Allocate, Fallback, cached_split
from petune.data.dataset import Split, TargetKind
from petune.data.folder import CROP
from petune.data.images import center_square, num_threads
from petune.data.reader import ReadContext
from petune.data.squares import center_mask
from petune.data.workers import image_workers

if TYPE_CHECKING:
    from PIL.Image import Image

CHUNK = 32
FORMAT = 1
"""Raised when the same samples are decoded to other pixels."""
DTYPES: dict[TargetKind, type] = {"class": np.int64, "multi_hot": np.uint8, "number": np.float64, "mask": np.uint8}


class Source(Protocol):
    """Samples by number, as most of torchvision's datasets are."""

    def __len__(self) -> int:
        """Return N."""

    def __getitem__(self, index: int, /) -> tuple[Any, Any]:
        """Return image and target of a sample."""


@dataclass(frozen=True)
class Samples:
    """Samples of one split.

    Attributes:
        name: Of dataset and split, for messages: `torchvision:DTD/train`.
        source: Yields them; from several threads at once.
        kind: Kind of the targets.
        image: Convert an image of `source` to one of Pillow.
        target: Convert a target of `source`: an int, an array of labels or numbers, or a mask as large as its image.
        side: Side of the images in pixels if all are square and are stored as they are; None for photos.
        names: The file of each sample, if it has one.
    """

    name: str
    source: Source
    kind: TargetKind
    image: Callable[[Any], Image]
    target: Callable[[Any], Any]
    side: int | None = None
    names: Sequence[str] | None = None


def read_samples(samples: Samples, context: ReadContext, key: dict[str, Any], *, find_copies: bool = False) -> Split:
    """Return the samples as a split, decoded now or by an earlier run with the same key, or on request.

    Args:
        samples: What to read.
        context: Side at which photos will be used, which are stored with a margin around it; and the size of the cache.
        key: Everything that the samples depend on.
        find_copies: Give equal images the same row, so that no split separates them; sort samples by file, because the
            order of a folder depends on the disk.

    Raises:
        DataError: An image cannot be decoded, or a mask has another size than its image.
    """
    side = samples.side or math.ceil(context.image_size / CROP)
    crop = 1.0 if samples.side else CROP
    order = np.arange(len(samples.source))
    if find_copies and samples.names is not None:
        order = np.argsort(np.array(samples.names), kind="stable")
    whole_key = {**key, "samples": FORMAT, "side": side, "count": len(order), "copies": find_copies}

    def decode(allocate: Allocate) -> tuple[NDArray[Any], NDArray[np.int64]]:
        targets, digests = _decode(samples, order, allocate(len(order), side))
        return targets, _rows(digests) if find_copies else np.arange(len(order))

    fallback = Fallback(lambda row: _sample(samples, int(order[row]), side)[0], context.cache_gb)
    split = cached_split(whole_key, decode, crop, fallback)
    names = None if samples.names is None else np.array(samples.names)[order]
    return replace(split, names=names)


def _decode(samples: Samples, order: NDArray[np.int64], out: NDArray[np.uint8]) -> tuple[NDArray[Any], list[bytes]]:
    """Fill `out` with the images; return the targets, and a digest of each image."""
    targets: list[Any] = [None] * len(order)
    digests = [b""] * len(order)

    def decode(start: int) -> None:
        for row in range(start, min(start + CHUNK, len(order))):
            pixels, targets[row] = _sample(samples, int(order[row]), out.shape[1])
            out[row] = pixels
            digests[row] = hashlib.sha256(pixels.tobytes()).digest()

    with image_workers(num_threads()) as workers:
        for _ in workers.pool.map(decode, range(0, len(order), CHUNK)):
            pass
    return np.asarray(targets, DTYPES[samples.kind]), digests


def _sample(samples: Samples, index: int, side: int) -> tuple[NDArray[np.uint8], Any]:
    where = samples.names[index] if samples.names else f"image {index} of {samples.name}"
    try:
        image, target = samples.source[index]
        with samples.image(image) as image:  # a file that was opened and not loaded is still open
            pixels = center_square(image, side)
    except Exception as error:  # Pillow raises a dozen types, and each means that this image is broken
        raise DataError(
            f"{where}: not readable ({' '.join(str(error).split()) or type(error).__name__}). Get the files of "
            f"{samples.name} again"
        ) from None
    try:
        value = samples.target(target)
    except ValueError as error:
        raise DataError(f"{where}: {error}") from None
    return pixels, _mask_square(value, image.size, side, where) if samples.kind == "mask" else value


def _mask_square(mask: NDArray[np.uint8], size: tuple[int, int], side: int, where: str) -> NDArray[np.uint8]:
    height, width = mask.shape
    if (width, height) != size:
        raise DataError(f"{where}: the mask is {width}x{height}, but the image {size[0]}x{size[1]}")
    return center_mask(mask, side)


def _rows(digests: list[bytes]) -> NDArray[np.int64]:
    first: dict[bytes, int] = {}
    return np.array([first.setdefault(digest, i) for i, digest in enumerate(digests)], np.int64)
