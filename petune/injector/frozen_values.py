"""Notice frozen tensors whose values changed after attaching: no adapter file contains them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from petune.adapters.fingerprint import plain_parts
from petune.base.errors import AttachError
from petune.injector.keys import named_parameters
from petune.sites.file_values import original_values

CHUNK = 1 << 17
"""Integers that are weighed at a time: few, because each chunk takes as much memory again."""
FACTOR = 1_000_003
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By size in bytes, the integers that values are read as."""


@dataclass(frozen=True)
class Checksum:
    """A number that changes with the values of a tensor, and the dtypes and shapes of the tensor's parts."""

    kinds: tuple[tuple[torch.dtype, torch.Size], ...]
    total: int


class FrozenValues:
    """Checksums of a model's parameters and buffers, by state_dict key. They cost less than a tenth of `attach`."""

    def __init__(self, model: nn.Module) -> None:
        self._checksums = checksums(_tensors(model))

    def changed(self, model: nn.Module, left_out: Collection[int]) -> list[str]:
        """Return the keys of the tensors that have other values now.

        Those of another dtype or shape are not among them: the model was converted, or a forward made them.

        Args:
            model: The model.
            left_out: Identities of the tensors that attachments change or added.
        """
        frozen = {key: t for key, t in _tensors(model).items() if key in self._checksums and id(t) not in left_out}
        before = self._checksums
        return [k for k, now in checksums(frozen).items() if now.kinds == before[k].kinds and now != before[k]]

    def update(self, model: nn.Module, except_for: Collection[str]) -> None:
        """Take the present values as the backbone's own, but those of the keys `except_for`."""
        known = {key: t for key, t in _tensors(model).items() if key in self._checksums and key not in except_for}
        self._checksums |= checksums(known)


def checksums(tensors: dict[str, Tensor]) -> dict[str, Checksum]:
    """Return the checksums of tensors whose values this process can read, by key."""
    result: dict[str, Checksum] = {}
    for key, tensor in tensors.items():
        if tensor.is_meta:
            continue
        try:
            parts = [part.detach() for _, part in plain_parts(key, original_values(tensor))]
        except AttachError:  # sharded, for example
            continue
        kinds = tuple((part.dtype, part.shape) for part in parts)
        result[key] = Checksum(kinds, sum(_total(part) for part in parts))
    return result


def _total(values: Tensor) -> int:
    """Return a number made of the values' bits, read as large integers: the larger they are, the fewer to add."""
    flat = (torch.view_as_real(values) if values.is_complex() else values).contiguous().reshape(-1)
    per_word = 8 // flat.element_size()
    if flat.storage_offset() % per_word:  # words begin at multiples of their size
        flat = flat.clone()
    whole = flat.numel() // per_word * per_word
    words, rest = flat[:whole].view(torch.int64), flat[whole:].view(INTEGERS[flat.element_size()])
    return int(_weighed(words) * FACTOR + _weighed(rest))


def _weighed(words: Tensor) -> Tensor:
    """Return the sum of integers weighed by their positions, modulo 2^64: values in another order differ, too."""
    total = words.new_zeros((), dtype=torch.int64)
    weights = torch.arange(1, 2 * min(len(words), CHUNK) + 1, 2, device=words.device)
    for start in range(0, len(words), CHUNK):
        chunk = words[start : start + CHUNK]
        total = total * FACTOR + (chunk * weights[: len(chunk)]).sum()
    return total


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**named_parameters(model), **dict(model.named_buffers())}
