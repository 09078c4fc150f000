"""The fingerprint of a backbone: a SHA-256 over its frozen tensors, computed once as long as none of them changes."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

NUM_SAMPLES = 64
"""Values of each tensor that are compared to detect writes that PyTorch does not count."""
MAX_CACHED = 4
"""Digests kept for one model; each method that trains the backbone's own tensors leaves out others."""


@dataclass(frozen=True)
class _Cached:
    """A digest, and how to tell that it still holds.

    Attributes:
        tensors: By key. Weak references, so that a new tensor at an old address is not taken for the old one.
        states: For each tensor: dtype, shape, address, version and sampled values.
        digest: The SHA-256.
    """

    tensors: dict[str, weakref.ref[Tensor]]
    states: list[Any]
    digest: str


_CACHE: weakref.WeakKeyDictionary[nn.Module, list[_Cached]] = weakref.WeakKeyDictionary()


def fingerprint(model: nn.Module, frozen: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over frozen tensors, by key: name, dtype, shape and bytes.

    Hashing a whole backbone is slow when many adapters are loaded on it, so the digest is cached until a tensor is
    replaced, moved or written to. PyTorch counts writes to a tensor, but not those through its `.data`; a few sampled
    values of each tensor are compared for that.

    Args:
        model: The model that the digest is cached for.
        frozen: The tensors, by key in a fixed order.
    """
    states = [_state(tensor) for tensor in frozen.values()]
    cached = _CACHE.setdefault(model, [])
    for known in cached:
        if known.states == states and _are_the_same(known.tensors, frozen):
            return known.digest
    computed = digest(frozen)
    if None not in states:
        cached.append(_Cached({key: weakref.ref(tensor) for key, tensor in frozen.items()}, states, computed))
        del cached[:-MAX_CACHED]
    return computed


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over tensors, by key: name, dtype, shape and bytes."""
    sha256 = hashlib.sha256()
    for key, tensor in tensors.items():
        sha256.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha256.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()


def _state(tensor: Tensor) -> Any:
    """Return what changes with the tensor; None if PyTorch does not count writes to it."""
    if tensor.is_inference() or type(tensor) not in {Tensor, nn.Parameter}:
        return None
    values = tensor.detach()
    stride = max(1, values.numel() // NUM_SAMPLES)
    flat = values.view(-1) if values.is_contiguous() else values.reshape(-1)
    sampled = flat[::stride].cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return tensor.dtype, tuple(tensor.shape), tensor.data_ptr(), tensor._version, sampled


def _are_the_same(references: Mapping[str, weakref.ref[Tensor]], tensors: Mapping[str, Tensor]) -> bool:
    same_keys = references.keys() == tensors.keys()
    return same_keys and all(references[key]() is tensor for key, tensor in tensors.items())
