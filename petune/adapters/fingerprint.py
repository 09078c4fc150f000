"""The fingerprint of a backbone: a SHA-256 over its frozen tensors, computed once as long as none of them changes.

It does not depend on names, nor on the order in which a library registers or calls its layers: both change between
versions of transformers, and the model computes the same. The contents are sorted within each block, and the blocks are
in the order of the forward.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from petune.base.errors import AttachError
from petune.sites.file_values import file_slice_of, original_values

NUM_SAMPLES = 64
"""Values of each tensor that are compared to detect writes that PyTorch does not count."""
PLAIN = (Tensor, nn.Parameter)
MAX_CACHED = 4
"""Digests kept for one model; each method that trains the backbone's own tensors leaves out others."""


@dataclass(frozen=True)
class _Cached:
    """A digest, and how to tell that it still holds.

    Attributes:
        groups: See `digest`.
        tensors: By key. Weak references, so that a new tensor at an old address is not taken for the old one.
        states: For each tensor: dtype, shape, address, version and sampled values.
        digest: The SHA-256.
    """

    groups: dict[str, int]
    tensors: dict[str, weakref.ref[Tensor]]
    states: list[Any]
    digest: str


_CACHE: weakref.WeakKeyDictionary[nn.Module, list[_Cached]] = weakref.WeakKeyDictionary()


def fingerprint(model: nn.Module, frozen: Mapping[str, Tensor], groups: Mapping[str, int]) -> str:
    """Return the SHA-256 over the contents of frozen tensors; see `digest`.

    Hashing a whole backbone is slow when many adapters are loaded on it, so the digest is cached until a tensor is
    replaced, moved or written to. PyTorch counts writes to a tensor, but not those through its `.data`; a few sampled
    values of each tensor are compared for that.

    Args:
        model: The model that the digest is cached for.
        frozen: The tensors, by key in a fixed order.
        groups: See `digest`.
    """
    states = [tensor_state(tensor) for tensor in frozen.values()]
    own_groups = {key: groups[key] for key in frozen if key in groups}
    cached = _CACHE.setdefault(model, [])
    for known in cached:
        if known.states == states and known.groups == own_groups and _are_the_same(known.tensors, frozen):
            return known.digest
    computed = digest(frozen, own_groups)
    if None not in states:
        references = {key: weakref.ref(tensor) for key, tensor in frozen.items()}
        cached.append(_Cached(own_groups, references, states, computed))
        del cached[:-MAX_CACHED]
    return computed


def digest(tensors: Mapping[str, Tensor], groups: Mapping[str, int] | None = None) -> str:
    """Return the SHA-256 over the contents of tensors: dtype, shape and bytes, sorted within each group.

    A tensor subclass, such as a quantized weight, counts as the plain tensors that it is made of.

    Args:
        tensors: By key; keys are for error messages only.
        groups: By key, the index of the block that a tensor belongs to. Those of no block may be left out.

    Raises:
        AttachError: See `plain_parts`.
    """
    contents = sorted(((groups or {}).get(key, -1), _content(key, tensor)) for key, tensor in tensors.items())
    return hashlib.sha256("".join(f"{group} {content}\n" for group, content in contents).encode()).hexdigest()


def _content(key: str, tensor: Tensor) -> str:
    sha256 = hashlib.sha256()
    for _, part in plain_parts(key, original_values(tensor)):
        sha256.update(f"{part.dtype} {tuple(part.shape)}\n".encode())
        sha256.update(_bytes(part))
    return sha256.hexdigest()


def named_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over tensors with their names, in the given order, as adapters up to format 3 have it."""
    sha256 = hashlib.sha256()
    for key, tensor in tensors.items():
        for name, part in plain_parts(key, original_values(tensor)):
            sha256.update(f"{name} {part.dtype} {tuple(part.shape)}\n".encode())
            sha256.update(_bytes(part))
    return sha256.hexdigest()


def sampled_digest(tensor: Tensor) -> str:
    """Return a short digest of the shape and a few values of a tensor, to tell it from the others of a model.

    Returns:
        Twelve hexadecimal digits; for a tensor whose values cannot be read, its shape decides alone.
    """
    sha256 = hashlib.sha256(str(tuple(tensor.shape)).encode())
    in_file = file_slice_of(tensor)
    if in_file is not None:
        sha256.update(in_file.sampled(max(1, tensor.numel() // NUM_SAMPLES)))
        return sha256.hexdigest()[:12]
    try:
        parts = [] if tensor.is_meta else [part.detach() for _, part in plain_parts("", tensor)]
    except AttachError:  # sharded, for example
        parts = []
    for part in parts:
        sha256.update(_sampled_bytes(part))
    return sha256.hexdigest()[:12]


def _bytes(tensor: Tensor) -> memoryview:
    data: memoryview = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
    return data


def _sampled_bytes(values: Tensor) -> bytes:
    stride = max(1, values.numel() // NUM_SAMPLES)
    flat = values.view(-1) if values.is_contiguous() else values.reshape(-1)
    sampled: bytes = flat[::stride].cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return sampled


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


def tensor_state(tensor: Tensor) -> Any:
    """Return what changes with the tensor; None if PyTorch does not count writes to it."""
    part = file_slice_of(tensor)
    if part is not None:
        return part
    if type(tensor) in PLAIN:
        return _plain_state(tensor)
    if not getattr(tensor, "__tensor_flatten__", None):
        return None
    states = [_plain_state(part) for _, part in plain_parts("", tensor)]
    return None if None in states else states


def is_converted(before: Any, now: Any) -> bool:
    """Return True if a tensor is what it was, perhaps on another device or in another number format.

    Args:
        before, now: What `tensor_state` returned.
    """
    if before == now:
        return before is not None
    if not isinstance(before, tuple) or not isinstance(now, tuple) or len(before) != len(now):
        return False
    (dtype, *identity, sampled), (dtype_now, *identity_now, sampled_now) = before, now
    shape, _, version = identity
    shape_now, _, version_now = identity_now
    if (shape, version) != (shape_now, version_now) or len(sampled) == 0:
        return bool((shape, version, dtype) == (shape_now, version_now, dtype_now))
    values = torch.frombuffer(bytearray(sampled), dtype=dtype).to(dtype_now)
    return torch.equal(values, torch.frombuffer(bytearray(sampled_now), dtype=dtype_now))


def _plain_state(tensor: Tensor) -> Any:
    if tensor.is_inference() or tensor.is_quantized or type(tensor) not in PLAIN:
        return None
    sampled = _sampled_bytes(tensor.detach())
    return tensor.dtype, tuple(tensor.shape), tensor.data_ptr(), tensor._version, sampled


def _are_the_same(references: Mapping[str, weakref.ref[Tensor]], tensors: Mapping[str, Tensor]) -> bool:
    same_keys = references.keys() == tensors.keys()
    return same_keys and all(references[key]() is tensor for key, tensor in tensors.items())
