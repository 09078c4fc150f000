"""Arithmetic of adapters: weighted sums, task vectors, TIES and DARE, of tensors by key.

A task vector is what training has changed: the trained values minus those that training started from. All functions
take tensors of equal keys and shapes, compute in float32 or better, and return the number format of the first adapter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from petune.base.errors import UsageError

Tensors = Mapping[str, Tensor]
STATISTICS = ("running_mean", "running_var")
"""Buffers of BatchNorm that are averaged."""
COUNTER = "num_batches_tracked"
"""The buffer of BatchNorm that counts batches."""


def weighted_sum(adapters: Sequence[Tensors], coefficients: Sequence[float]) -> dict[str, Tensor]:
    """Return Σ_i c_i θ_i.

    Args:
        adapters: θ_i.
        coefficients: c_i, one each.
    """
    return {key: _sum([a[key] for a in adapters], coefficients).to(t.dtype) for key, t in adapters[0].items()}


def add_task_vectors(start: Tensors, adapters: Sequence[Tensors], coefficients: Sequence[float]) -> dict[str, Tensor]:
    """Return θ_0 + Σ_i λ_i (θ_i - θ_0): task arithmetic (Ilharco et al., ICLR 2023, arXiv 2212.04089, section 2).

    Args:
        start: θ_0.
        adapters: θ_i.
        coefficients: λ_i; a negative one takes away what an adapter has learned.
    """
    vectors = [_difference(adapter, start) for adapter in adapters]
    return _added(start, {key: _sum([v[key] for v in vectors], coefficients) for key in start}, 1.0, adapters[0])


def interpolate(start: Tensors, trained: Tensors, share: float) -> dict[str, Tensor]:
    """Return (1 - α) θ_0 + α θ: WiSE-FT (Wortsman et al., CVPR 2022, arXiv 2109.01903, equation 1).

    Args:
        start: θ_0.
        trained: θ.
        share: α; 0 is the start, 1 the trained values.
    """
    return weighted_sum([trained, start], [share, 1 - share])


def ties(start: Tensors, adapters: Sequence[Tensors], coefficient: float, density: float) -> dict[str, Tensor]:
    """Return θ_0 + λ τ, with the task vectors trimmed, their signs elected, and those that agree averaged into τ.

    TIES-Merging (Yadav et al., NeurIPS 2023, arXiv 2306.01708, algorithm 1). Each task vector is trimmed as a whole,
    not tensor by tensor, as in the authors' code.

    Args:
        start: θ_0.
        adapters: θ_i.
        coefficient: λ.
        density: k, the share of each task vector that is kept; the rest, smallest in magnitude, becomes 0.

    Raises:
        UsageError: The adapters hold complex numbers, which have no sign.
    """
    _refuse_complex(adapters[0])
    vectors = [_difference(adapter, start) for adapter in adapters]
    limits = [_smallest_kept(vector, density) for vector in vectors]
    sums = {}
    total_sign = 0.0
    for key in start:
        trimmed = [_above(vector[key], limit) for vector, limit in zip(vectors, limits, strict=True)]
        sums[key] = torch.stack(trimmed)
        total_sign += float(sums[key].sum(0).sign().sum())
    majority = float(torch.tensor(total_sign).sign())
    merged = {key: _mean_of_elected(values, majority) for key, values in sums.items()}
    return _added(start, merged, coefficient, adapters[0])


def dare(
    start: Tensors, adapters: Sequence[Tensors], coefficients: Sequence[float], density: float, seed: int
) -> dict[str, Tensor]:
    """Return θ_0 + Σ_i λ_i m_i ⊙ (θ_i - θ_0) / k, where m_i keeps a random share k of each task vector.

    DARE (Yu et al., ICML 2024, arXiv 2311.03099, equation 2), followed by task arithmetic. The paper's drop rate is
    1 - k.

    Args:
        start: θ_0.
        adapters: θ_i.
        coefficients: λ_i.
        density: k.
        seed: Chooses what is kept.
    """
    generator = torch.Generator().manual_seed(seed)
    vectors = [_difference(adapter, start) for adapter in adapters]
    for vector in vectors:
        for key in sorted(vector):
            kept = torch.rand(vector[key].shape, generator=generator) < density
            vector[key] = vector[key] * kept.to(vector[key].device) / density
    return _added(start, {key: _sum([v[key] for v in vectors], coefficients) for key in start}, 1.0, adapters[0])


def combine_buffers(adapters: Sequence[Tensors], coefficients: Sequence[float]) -> dict[str, Tensor]:
    """Return one value for each tensor that does not train: buffers, and parameters that are fixed.

    Equal values are kept. Statistics of BatchNorm are averaged, and of its counters the largest is taken.

    Args:
        adapters: The tensors of each adapter.
        coefficients: For the statistics.

    Raises:
        UsageError: Other values differ, such as constants that each seed draws anew, or indices.
    """
    combined = {}
    for key, first in adapters[0].items():
        values = [adapter[key] for adapter in adapters]
        name = key.rpartition(".")[2]
        if all(torch.equal(value, first) for value in values):
            combined[key] = first
        elif name in STATISTICS:
            combined[key] = _sum(values, coefficients).to(first.dtype)
        elif name == COUNTER:
            combined[key] = torch.stack(values).amax(0)
        else:
            raise UsageError(
                f"{key} differs between the adapters and does not train: it holds constants or indices, which have no "
                "average. Average adapters that have it in common, such as those of one seed, or of runs that continue "
                "the same adapter (petune run --from)"
            )
    return combined


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _sum(tensors: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    total = torch.zeros_like(_wide(tensors[0]))
    for tensor, coefficient in zip(tensors, coefficients, strict=True):
        total += coefficient * _wide(tensor)
    return total


def _difference(adapter: Tensors, start: Tensors) -> dict[str, Tensor]:
    return {key: _wide(adapter[key]) - _wide(start[key]) for key in start}


def _added(start: Tensors, change: Tensors, coefficient: float, like: Tensors) -> dict[str, Tensor]:
    return {key: (_wide(t) + coefficient * change[key]).to(like[key].dtype) for key, t in start.items()}


def _smallest_kept(vector: Tensors, density: float) -> float:
    """Return the magnitude from which on values are kept, as in the authors' code: the (d - ⌊kd⌋)-th smallest of d."""
    magnitudes = torch.cat([t.flatten() for t in vector.values()]).abs()
    position = magnitudes.numel() - int(magnitudes.numel() * density)
    return float(magnitudes.kthvalue(position).values) if position > 0 else 0.0


def _above(tensor: Tensor, limit: float) -> Tensor:
    return tensor * (tensor.abs() >= limit)


def _mean_of_elected(values: Tensor, majority: float) -> Tensor:
    """Return the mean over adapters of the values that have the sign of their sum; of a sum of 0, the majority's."""
    sign = values.sum(0).sign()
    sign = torch.where(sign == 0, majority, sign)
    elected = values * torch.where(sign > 0, values > 0, values < 0)
    return elected.sum(0) / (elected != 0).sum(0).clamp(min=1)


def _refuse_complex(adapter: Tensors) -> None:
    key = next((key for key, tensor in adapter.items() if tensor.is_complex()), None)
    if key is not None:
        raise UsageError(f"{key} holds complex numbers, which have no sign for TIES to elect. Use another algorithm")
