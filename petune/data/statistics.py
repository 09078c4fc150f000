"""Mean and standard deviation of each channel.

Legend: N pixels of a few images, C channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation per channel, for white at 1."""
CHUNK = 32
"""Images (or clips) per step; bounds the memory."""
WHITE = {"uint8": 255.0, "uint16": 65535.0}
SMALLEST_STD = 1e-3


def channel_statistics(images: Any, rows: NDArray[np.int64]) -> Statistics:
    """Return mean and standard deviation per channel of the images at these rows.

    Args:
        images: See `petune.data.dataset.Split`.
        rows: Which of them.
    """
    return _of_bytes(images, rows) if images.dtype == np.uint8 else _of_numbers(images, rows)


def value_range(images: Any, rows: NDArray[np.int64]) -> tuple[float, float]:
    """Return the smallest and the largest value of the images at these rows, white at 1."""
    white = WHITE.get(str(images.dtype), 1.0)
    low, high = np.inf, -np.inf
    for start in range(0, len(rows), CHUNK):
        pixels = np.asarray(images[rows[start : start + CHUNK]])
        low, high = min(low, float(pixels.min()) / white), max(high, float(pixels.max()) / white)
    return low, high


def _of_bytes(images: Any, rows: NDArray[np.int64]) -> Statistics:
    channels = images.shape[-1]
    counts_C256 = np.zeros((channels, 256), np.int64)  # pixels as float64 would take 8 times the memory
    step = max(1, CHUNK // (images.shape[1] if len(images.shape) == 5 else 1))
    for start in range(0, len(rows), step):
        pixels_NC = np.asarray(images[rows[start : start + step]]).reshape(-1, channels)
        counts_C256 += [np.bincount(channel, minlength=256) for channel in pixels_NC.T]
    values_256 = (np.arange(256, dtype=np.float32) / 255).astype(np.float64)
    shares_C256 = counts_C256 / counts_C256.sum(1, keepdims=True)
    mean = shares_C256 @ values_256
    std = np.sqrt((shares_C256 * (values_256 - mean[:, None]) ** 2).sum(1))
    return tuple(round(float(m), 6) for m in mean), tuple(round(max(float(s), SMALLEST_STD), 6) for s in std)


def _of_numbers(images: Any, rows: NDArray[np.int64]) -> Statistics:
    """Return the statistics of 16 bits or floats, whose channels may be of any unit: six digits of each."""
    channels = images.shape[-1]
    white = WHITE.get(str(images.dtype), 1.0)
    offset = np.zeros(channels)  # near the mean, so that squares lose no digits
    total, squares, count = np.zeros(channels), np.zeros(channels), 0
    for start in range(0, len(rows), CHUNK):
        pixels_NC = np.asarray(images[rows[start : start + CHUNK]]).reshape(-1, channels) / white
        if start == 0:
            offset = pixels_NC.mean(0, dtype=np.float64)
        centered_NC = pixels_NC.astype(np.float64) - offset
        total += centered_NC.sum(0)
        squares += (centered_NC**2).sum(0)
        count += len(centered_NC)
    mean = total / max(1, count)
    std = np.sqrt(np.maximum(squares / max(1, count) - mean**2, 0))
    std = np.where(std > 0, std, 1.0)  # a channel that is the same everywhere becomes 0
    return tuple(float(f"{m:.6g}") for m in mean + offset), tuple(float(f"{s:.6g}") for s in std)
