"""The fingerprint of a backbone: a SHA-256 over its frozen tensors, computed once as long as none of them changes."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from petune.base.errors import AttachError

NUM_SAMPLES = 64
"""Values of each tensor that are compared to detect writes that PyTorch does not count."""
PLAIN = (Tensor, nn.Parameter)
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
    """Return the SHA-256 over tensors, by key: name, dtype, shape and bytes.

    A tensor subclass, such as a quantized weight, counts as the plain tensors that it is made of.

    Raises:
        AttachError: See `plain_parts`.
    """
    sha256 = hashlib.sha256()
    for key, tensor in tensors.items():
        for name, part in plain_parts(key, tensor):
            sha256.update(f"{name} {part.dtype} {tuple(part.shape)}\n".encode())
            sha256.update(part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()


def plain_parts(key: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """Return the plain tensors that hold the values of a tensor; for a plain one, the tensor itself.

    Args:
        key: The name of `tensor`; those of its parts start with it.
        tensor: A plain tensor, or a subclass such as a quantized weight.

    Raises:
        AttachError: The values cannot be read: a subclass does not say what it is made of, or is sharded.
    """
    if type(tensor) in PLAIN and not tensor.is_quantized:
        return [(key, tensor)]
    if hasattr(tensor, "full_tensor"):
        raise AttachError(f"{key} is sharded over processes. Attach and save with a model that is not sharded")
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:
        names = flatten()[0]
        return [part for name in names for part in plain_parts(f"{key}.{name}", getattr(tensor, name))]
    return [(key, _values(key, tensor))]


def _values(key: str, tensor: Tensor) -> Tensor:
    """Return the values of a tensor that does not say what it is made of."""
    try:
        if tensor.is_quantized:
            return tensor.detach().dequantize()
        plain = tensor.detach().as_subclass(Tensor)
        plain.view(-1)[:1].cpu().numpy()  # fails without a storage
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise AttachError(
            f"the values of {key} cannot be read, because {type(tensor).__name__} has no __tensor_flatten__: {error}. "
            "Use another kind of tensor for the frozen weights"
        ) from None
    return plain


def _state(tensor: Tensor) -> Any:
    """Return what changes with the tensor; None if PyTorch does not count writes to it."""
    if type(tensor) in PLAIN:
        return _plain_state(tensor)
    if not getattr(tensor, "__tensor_flatten__", None):
        return None
    states = [_plain_state(part) for _, part in plain_parts("", tensor)]
    return None if None in states else states


def _plain_state(tensor: Tensor) -> Any:
    if tensor.is_inference() or tensor.is_quantized or type(tensor) not in PLAIN:
        return None
    values = tensor.detach()
    stride = max(1, values.numel() // NUM_SAMPLES)
    flat = values.view(-1) if values.is_contiguous() else values.reshape(-1)
    sampled = flat[::stride].cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return tensor.dtype, tuple(tensor.shape), tensor.data_ptr(), tensor._version, sampled


def _are_the_same(references: Mapping[str, weakref.ref[Tensor]], tensors: Mapping[str, Tensor]) -> bool:
    same_keys = references.keys() == tensors.keys()
    return same_keys and all(references[key]() is tensor for key, tensor in tensors.items())
