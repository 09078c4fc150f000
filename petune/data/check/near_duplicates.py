"""Find near-duplicates: recompressed, resized, brightened or mirrored copies of an image, by a perceptual hash.

The hash is that of pHash (low frequencies of a cosine transform of the gray image) with real numbers instead of signs,
so that two hashes are compared by their cosine. Frequencies are weighted by their radius, because in photos the lowest
ones dominate and are alike in different images.

Shapes: N images, S side in pixels, F frequencies, Q queries, R references.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SIDE = 32
"""Side in pixels of the gray images that are hashed."""
NUM_FREQUENCIES = 8
THRESHOLD = 0.95
"""Smallest cosine of near-duplicates. In CIFAR-10, 577 of the 1.8 billion pairs reach it, and all of 96 that were
looked at are the same photo; from 0.93 to 0.95 about 7 of 96 are not. It finds all of 1,000 images after JPEG of
quality 30, after halving their size, mirrored or at 70 % brightness, and 98 % of them at 130 % brightness."""
MIN_CONTRAST = 2.0
"""Images whose gray levels deviate less from their mean (standard deviation, of 255) are only compared exactly."""
QUERY_BLOCK, REFERENCE_BLOCK = (
    512,
    2048,
)  # products that fit the processor's cache; larger ones take three times as long


@dataclass(frozen=True)
class Hashes:
    """Hashes of N images, divided by parity: mirroring an image changes the sign of the odd horizontal frequencies.

    Attributes:
        even_NF, odd_NF: float32; together of length 1, or 0 for an image without contrast.
    """

    even_NF: Tensor
    odd_NF: Tensor

    @classmethod
    def of(cls, gray_NSS: NDArray[np.uint8]) -> Hashes:
        """Hash gray images, uint8 (N, 32, 32)."""
        pixels = torch.from_numpy(gray_NSS).float()
        cosines_FS = _cosines()
        spectrum_NFF = cosines_FS @ pixels @ cosines_FS.T
        index_F = torch.arange(NUM_FREQUENCIES)
        spectrum_NFF *= torch.hypot(index_F[:, None], index_F[None].float())
        length_N = spectrum_NFF.flatten(1).norm(dim=1)
        has_contrast_N = pixels.flatten(1).std(dim=1) >= MIN_CONTRAST
        spectrum_NFF *= (has_contrast_N / length_N.clamp(min=1e-6))[:, None, None]
        even, odd = spectrum_NFF[:, :, 0::2], spectrum_NFF[:, :, 1::2]
        return cls(even.flatten(1).contiguous(), odd.flatten(1).contiguous())

    def __len__(self) -> int:
        return len(self.even_NF)


@dataclass(frozen=True)
class Twins:
    """The most similar reference of each query.

    Attributes:
        similarity_Q: float32; 0 if none reaches the threshold.
        reference_Q: int64; its position.
        mirrored_Q: bool; True if one is the mirror image of the other.
        num_pairs: Number of pairs of a query and a reference that reach the threshold.
    """

    similarity_Q: Tensor
    reference_Q: Tensor
    mirrored_Q: Tensor
    num_pairs: int


def find_twins(queries: Hashes, references: Hashes | None = None) -> Twins:
    """Compare every query with every reference.

    Args:
        queries: Hashes of Q images.
        references: Hashes of R images; None compares each query with the queries before it.
    """
    others = queries if references is None else references
    similarity_Q = torch.zeros(len(queries))
    reference_Q = torch.zeros(len(queries), dtype=torch.long)
    mirrored_Q = torch.zeros(len(queries), dtype=torch.bool)
    num_pairs = 0
    for start in range(0, len(queries), QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, len(queries))
        for first in range(0, stop if references is None else len(others), REFERENCE_BLOCK):
            last = min(first + REFERENCE_BLOCK, len(others))
            even_QR = queries.even_NF[start:stop] @ others.even_NF[first:last].T
            odd_QR = queries.odd_NF[start:stop] @ others.odd_NF[first:last].T
            similarity_QR = odd_QR.abs().add_(even_QR)
            if references is None and last > start:
                similarity_QR.tril_(diagonal=start - first - 1)
            if similarity_QR.max() < THRESHOLD:
                continue
            num_pairs += int((similarity_QR >= THRESHOLD).sum())
            best_Q, column_Q = similarity_QR.max(dim=1)
            rows = torch.nonzero((best_Q >= THRESHOLD) & (best_Q > similarity_Q[start:stop])).flatten()
            columns = column_Q[rows]
            similarity_Q[start + rows] = best_Q[rows]
            reference_Q[start + rows] = first + columns
            mirrored_Q[start + rows] = odd_QR[rows, columns] < 0
    return Twins(similarity_Q, reference_Q, mirrored_Q, num_pairs)


def _cosines() -> Tensor:
    """Return the low frequencies of an orthonormal cosine transform, float32 (F, S)."""
    phase_S = (torch.arange(SIDE) + 0.5) * math.pi / SIDE
    cosines_FS = torch.cos(torch.arange(NUM_FREQUENCIES)[:, None] * phase_S) * math.sqrt(2 / SIDE)
    cosines_FS[0] /= math.sqrt(2)
    return cosines_FS
