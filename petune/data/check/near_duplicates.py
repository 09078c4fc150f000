"""Find near-duplicates: recompressed, resized, brightened or mirrored copies of an image, by a perceptual hash.

The hash is that of pHash (low frequencies of a cosine transform of the gray image) with real numbers instead of signs,
so that two hashes are compared by their cosine. Frequencies are weighted by their radius, because in photos the lowest
ones dominate and are alike in different images.

Images of one kind, such as garments on black, have like hashes although they are different. So the details (the
frequencies above) of a candidate are compared too: a copy is closer in them than other images with like hashes are.

Shapes: N images, S side in pixels, F frequencies, Q queries, R references, K neighbors.
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
"""Smallest cosine of the hashes of near-duplicates."""
DETAIL_RADII = (4, 14)
"""Frequencies of the details, by their radius; those above are lost in recompressed copies."""
NEIGHBORS = 10
"""References with the most similar hashes, whose details are compared."""
MAX_RATIO = 0.25
"""Largest distance of a copy's details, by the median distance of the neighbors. Found are 127 test images of CIFAR-10
with a copy in train (all of those looked at are the same photo; 141 have a like hash), and 146 of the 10,000 of
Fashion-MNIST (nearly all show the same article, some in another color; 5,894 have a like hash, mostly different
garments). The pages about data tell how many edited copies are found."""
DISTANCE_OF_DIFFERENT = 0.6
"""Distance of the details of photos with like hashes; counts in the median where there are fewer neighbors."""
MIN_CONTRAST = 2.0
"""Images whose gray levels deviate less from their mean (standard deviation, of 255) are only compared exactly."""
QUERY_BLOCK, REFERENCE_BLOCK = (
    512,
    2048,
)  # products that fit the processor's cache; larger ones take three times as long


@dataclass(frozen=True)
class Spectra:
    """Weighted frequencies of N images, divided by parity: mirroring changes the sign of the odd horizontal ones.

    Attributes:
        even_NF, odd_NF: float32; together of length 1, or 0 for an image without contrast.
    """

    even_NF: Tensor
    odd_NF: Tensor

    @classmethod
    def of(cls, gray_NSS: NDArray[np.uint8], count: int, radii: tuple[float, float] = (0, math.inf)) -> Spectra:
        """Transform gray images, uint8 (N, 32, 32), to `count` x `count` frequencies; others than `radii` are 0."""
        pixels = torch.from_numpy(gray_NSS).float()
        cosines_FS = _cosines(count)
        spectrum_NFF = cosines_FS @ pixels @ cosines_FS.T
        index_F = torch.arange(count)
        radius_FF = torch.hypot(index_F[:, None], index_F[None].float())
        spectrum_NFF *= radius_FF * ((radius_FF >= radii[0]) & (radius_FF < radii[1]))
        length_N = spectrum_NFF.flatten(1).norm(dim=1)
        has_contrast_N = pixels.flatten(1).std(dim=1) >= MIN_CONTRAST
        spectrum_NFF *= (has_contrast_N / length_N.clamp(min=1e-6))[:, None, None]
        even, odd = spectrum_NFF[:, :, 0::2], spectrum_NFF[:, :, 1::2]
        return cls(even.flatten(1).contiguous(), odd.flatten(1).contiguous())


@dataclass(frozen=True)
class Hashes:
    """Hashes of N images.

    Attributes:
        gray_NSS: The images, uint8 (N, 32, 32).
        low: Their low frequencies.
    """

    gray_NSS: NDArray[np.uint8]
    low: Spectra

    @classmethod
    def of(cls, gray_NSS: NDArray[np.uint8]) -> Hashes:
        """Hash gray images, uint8 (N, 32, 32)."""
        return cls(gray_NSS, Spectra.of(gray_NSS, NUM_FREQUENCIES))

    def __len__(self) -> int:
        return len(self.gray_NSS)

    def details(self, positions: NDArray[np.int64]) -> Spectra:
        """Return the frequencies of some images that tell alike ones apart."""
        return Spectra.of(self.gray_NSS[positions], DETAIL_RADII[1], DETAIL_RADII)


@dataclass(frozen=True)
class Twins:
    """The most similar copy of each query among the references.

    Attributes:
        similarity_Q: float32, the cosine of the hashes; 0 if there is no copy.
        reference_Q: int64; its position.
        mirrored_Q: bool; True if one is the mirror image of the other.
        num_pairs: Number of pairs of a query and its copies, at most `NEIGHBORS` for a query.
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
    candidates = _candidates(queries, references)
    for start in range(0, len(candidates), QUERY_BLOCK):
        rows = candidates[start : start + QUERY_BLOCK]
        similarity_QK, index_QK, mirrored_QK = _neighbors(queries, others, rows, is_same=references is None)
        distance_QK = _detail_distances(queries, others, rows, index_QK)
        is_copy_QK = (similarity_QK >= THRESHOLD) & (distance_QK <= MAX_RATIO * _background(distance_QK)[:, None])
        if references is None:
            is_copy_QK &= index_QK < rows[:, None]
        num_pairs += int(is_copy_QK.sum())
        best_Q, column_Q = (similarity_QK * is_copy_QK).max(dim=1)
        similarity_Q[rows] = best_Q
        reference_Q[rows] = index_QK.gather(1, column_Q[:, None])[:, 0]
        mirrored_Q[rows] = mirrored_QK.gather(1, column_Q[:, None])[:, 0]
    return Twins(similarity_Q, reference_Q, mirrored_Q, num_pairs)


def _candidates(queries: Hashes, references: Hashes | None) -> Tensor:
    """Return the positions of the queries whose hash is like that of a reference, or of an earlier query."""
    others = queries if references is None else references
    is_candidate_Q = torch.zeros(len(queries), dtype=torch.bool)
    for start in range(0, len(queries), QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, len(queries))
        for first in range(0, stop if references is None else len(others), REFERENCE_BLOCK):
            last = min(first + REFERENCE_BLOCK, len(others))
            similarity_QR, _ = _compare(queries.low, slice(start, stop), others.low, slice(first, last))
            if references is None and last > start:
                similarity_QR.tril_(diagonal=start - first - 1)
            if similarity_QR.max() >= THRESHOLD:
                is_candidate_Q[start:stop] |= (similarity_QR >= THRESHOLD).any(dim=1)
    return torch.nonzero(is_candidate_Q).flatten()


def _compare(queries: Spectra, rows: Tensor | slice, references: Spectra, columns: slice) -> tuple[Tensor, Tensor]:
    """Return the cosines (Q, R), of the mirrored reference where it is more similar, and the sign of the odd part."""
    even_QR = queries.even_NF[rows] @ references.even_NF[columns].T
    odd_QR = queries.odd_NF[rows] @ references.odd_NF[columns].T
    return odd_QR.abs().add_(even_QR), odd_QR


def _neighbors(queries: Hashes, others: Hashes, rows: Tensor, *, is_same: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return cosine, position and whether mirrored of the references whose hashes are most like those of `rows`."""
    similarity, index, mirrored = (
        torch.zeros(len(rows), 0, dtype=kind) for kind in (torch.float, torch.long, torch.bool)
    )
    for first in range(0, len(others), REFERENCE_BLOCK):
        columns = slice(first, min(first + REFERENCE_BLOCK, len(others)))
        similarity_QR, odd_QR = _compare(queries.low, rows, others.low, columns)
        if is_same:
            is_here = (rows >= first) & (rows < columns.stop)
            similarity_QR[is_here, rows[is_here] - first] = -1.0
        best, column = similarity_QR.topk(min(NEIGHBORS, similarity_QR.shape[1]), dim=1)
        index = torch.cat([index, column + first], dim=1)
        mirrored = torch.cat([mirrored, odd_QR.gather(1, column) < 0], dim=1)
        similarity, kept = torch.cat([similarity, best], dim=1).topk(min(NEIGHBORS, index.shape[1]), dim=1)
        index, mirrored = index.gather(1, kept), mirrored.gather(1, kept)
    return similarity, index, mirrored


def _detail_distances(queries: Hashes, others: Hashes, rows: Tensor, index_QK: Tensor) -> Tensor:
    """Return 1 - cosine of the details of each query and its neighbors, (Q, K)."""
    details = queries.details(rows.numpy())
    positions, inverse = np.unique(index_QK.numpy(), return_inverse=True)
    neighbors, inverse_QK = others.details(positions), torch.from_numpy(inverse.reshape(index_QK.shape))
    even_QK = torch.einsum("qf,qkf->qk", details.even_NF, neighbors.even_NF[inverse_QK])
    odd_QK = torch.einsum("qf,qkf->qk", details.odd_NF, neighbors.odd_NF[inverse_QK])
    return 1 - (even_QK + odd_QK.abs())


def _background(distance_QK: Tensor) -> Tensor:
    """Return the median distance of a query's neighbors: what separates different images here."""
    missing = NEIGHBORS - distance_QK.shape[1]
    filled = torch.nn.functional.pad(distance_QK, (0, missing), value=DISTANCE_OF_DIFFERENT)
    return filled.median(dim=1).values


def _cosines(count: int) -> Tensor:
    """Return the low frequencies of an orthonormal cosine transform, float32 (F, S)."""
    phase_S = (torch.arange(SIDE) + 0.5) * math.pi / SIDE
    cosines_FS = torch.cos(torch.arange(count)[:, None] * phase_S) * math.sqrt(2 / SIDE)
    cosines_FS[0] /= math.sqrt(2)
    return cosines_FS
