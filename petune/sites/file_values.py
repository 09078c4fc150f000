"""Frozen weights whose values stay in a file: mapped into memory, and read a tensor at a time.

A mapped tensor takes memory only for what is read through it. `FileSlice.read` does not read through it, so looking at
every weight of a model once takes the memory of one.
"""

from __future__ import annotations

import io
import json
import math
import mmap
import os
import sys
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from petune.base.errors import CheckpointError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""Those of a safetensors file that are mapped."""
ATTRIBUTE = "petune_file_slice"
"""Set on a parameter whose values are in a file."""
ROUNDED = "petune_rounded"
"""Set on such a parameter once its values in bfloat16 are in memory."""
NUM_SAMPLES = 8
"""Values of each tensor that are compared to detect writes; each one read maps 64 kB of the file around it."""
SMALLEST = 2**18
"""A tensor of fewer bytes is read at once: it saves no memory."""


Entry = tuple[int, tuple[int, ...], torch.dtype]
"""Position of a tensor in bytes from the start of the file, its shape and dtype."""


class MappedFile:
    """A file with tensors, mapped privately: writing to a tensor does not change the file.

    Args:
        path: Of a valid file.
        entries: The tensors by key; None reads them from the header of a safetensors file.

    Attributes:
        tensors: By key, mapped; those of formats that torch cannot map are missing.
    """

    def __init__(self, path: Path, entries: Mapping[str, Entry] | None = None) -> None:
        self.path = path
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self._file = io.FileIO(descriptor, closefd=False)
        weakref.finalize(self, os.close, descriptor)
        if entries is None:
            entries = _safetensors_entries(self._file)
        self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._address = torch.frombuffer(self._map, dtype=torch.uint8).data_ptr()
        self._lock = threading.Lock()
        self._slices: dict[int, FileSlice] = {}
        self.tensors: dict[str, Tensor] = {}
        for key, (start, shape, dtype) in entries.items():
            self.tensors[key] = self._mapped(FileSlice(self, start, shape, dtype))

    def slice_of(self, tensor: Tensor) -> FileSlice | None:
        """Return where the values of a tensor are in the file; None if it is not one of `tensors`, unchanged."""
        part = self._slices.get(tensor.data_ptr())
        is_whole = part is not None and part.shape == tuple(tensor.shape) and part.dtype == tensor.dtype
        return part if is_whole and tensor.is_contiguous() else None

    def is_unchanged(self, tensor: Tensor, part: FileSlice) -> bool:
        """Return whether a tensor is still the mapped one, and has the values of the file; a few are compared."""
        if self.slice_of(tensor) is not part:
            return False
        stride = max(1, tensor.numel() // NUM_SAMPLES)
        sampled = tensor.detach().view(-1)[::stride].contiguous().view(torch.uint8).numpy()
        return bool(sampled.tobytes() == part.sampled(stride))

    def holds(self, tensor: Tensor) -> bool:
        """Return whether a tensor is a part of the mapped file, or a view of one."""
        return 0 <= tensor.data_ptr() - self._address < len(self._map)

    def forget(self) -> None:
        """Give back the memory of what was read through the mapping; it is read again when it is needed."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill a buffer from the file, from a position in bytes on.

        Raises:
            CheckpointError: The file has become shorter.
        """
        with self._lock:
            self._file.seek(start)
            while buffer and (count := self._file.readinto(buffer)):  # at most 2 GB at a time
                buffer = buffer[count:]
            if buffer:
                raise CheckpointError(f"{self.path} has changed while it was used. Give it its content again")

    def _mapped(self, part: FileSlice) -> Tensor:
        if not part.num_bytes or part.num_bytes < SMALLEST or part.start % part.dtype.itemsize:
            return part.read()
        count = math.prod(part.shape)
        tensor = torch.frombuffer(self._map, dtype=part.dtype, count=count, offset=part.start).reshape(part.shape)
        self._slices[tensor.data_ptr()] = part
        return tensor


def _safetensors_entries(file: io.FileIO) -> dict[str, Entry]:
    size = int.from_bytes(file.read(8), "little")
    header: dict[str, Any] = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return {
        key: (8 + size + entry["data_offsets"][0], tuple(entry["shape"]), DTYPES[entry["dtype"]])
        for key, entry in header.items()
        if entry["dtype"] in DTYPES
    }


@dataclass(frozen=True, eq=False)
class FileSlice:
    """A tensor in a file.

    Attributes:
        file: The file.
        start: Position in bytes.
        shape, dtype: The tensor's.
    """

    file: MappedFile
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """Return the values, in memory of their own."""
        value = torch.empty(self.shape, dtype=self.dtype)
        if self.num_bytes:
            self.file.read_into(self.start, value.view(-1).view(torch.uint8).numpy().data)
        return value

    def sampled(self, stride: int) -> bytes:
        """Return every `stride`-th value, as bytes."""
        size, count = self.dtype.itemsize, math.prod(self.shape)
        values = bytearray(size * len(range(0, count, stride)))
        for number, position in enumerate(range(0, count, stride)):
            self.file.read_into(self.start + position * size, memoryview(values)[number * size : (number + 1) * size])
        return bytes(values)


def file_slice_of(tensor: Tensor) -> FileSlice | None:
    """Return where the original values of a parameter are, if they are in a file; see `keep_in_file`."""
    part: FileSlice | None = getattr(tensor, ATTRIBUTE, None)
    return part


def keep_in_file(parameter: nn.Parameter, part: FileSlice) -> None:
    """Record that the values of a mapped parameter are in a file; see `settle`."""
    setattr(parameter, ATTRIBUTE, part)


def settle(parameters: Iterable[nn.Parameter]) -> None:
    """Take those parameters out of the file that train or have other values now, each with the values that it has."""
    files = set()
    for p in parameters:
        part = file_slice_of(p)
        if part is None:
            continue
        files.add(part.file)
        if p.requires_grad or not part.file.is_unchanged(p.data, part):
            delattr(p, ATTRIBUTE)
            p.data = p.data.clone()
    for file in files:
        file.forget()


def keep_rounded(parameter: nn.Parameter, values: Tensor) -> None:
    """Remember a parameter's values in bfloat16; see `rounded_values`."""
    setattr(parameter, ROUNDED, values)


@contextmanager
def rounded_values(model: nn.Module) -> Iterator[None]:
    """Give parameters whose values are in a file those in bfloat16 that `keep_rounded` got, inside the context."""
    known = [(p, p.data) for p in model.parameters() if hasattr(p, ROUNDED)]
    try:
        for p, _ in known:
            p.data = getattr(p, ROUNDED)
        yield
    finally:
        for p, before in known:
            p.data = before


def original_values(tensor: Tensor) -> Tensor:
    """Return the values that a tensor had when it was loaded, without mapping them if they are in a file."""
    part = file_slice_of(tensor)
    return tensor if part is None else part.read()


@contextmanager
def read_layer_by_layer(model: nn.Module) -> Iterator[None]:
    """Give each layer its original values while it runs, and take them away again, inside the context.

    A forward then takes the memory of one layer, and gives the same bits. Layers without values in a file run as they
    are, also those whose weights another module reads.
    """
    owners = [(m, _in_file(m)) for m in model.modules()]
    with ExitStack() as stack:
        for module, parameters in owners:
            if parameters:
                stack.enter_context(_read_on_call(module, parameters))
        yield


def _in_file(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module._parameters.values() if p is not None and file_slice_of(p) is not None]


@contextmanager
def _read_on_call(module: nn.Module, parameters: list[nn.Parameter]) -> Iterator[None]:
    before: list[Tensor] = []

    def enter(module: nn.Module, args: Any) -> None:
        with torch._C.DisableTorchFunction():  # whoever watches how weights are used sees the layer's own use only
            if not before:
                before.extend(p.data for p in parameters)
                for p in parameters:
                    p.data = original_values(p)

    def leave(module: nn.Module | None = None, args: Any = None, output: Any = None) -> None:
        with torch._C.DisableTorchFunction():
            for p, value in zip(parameters if before else (), before, strict=True):
                p.data = value
        before.clear()

    handles = [
        module.register_forward_pre_hook(enter, prepend=True),
        module.register_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        leave()


def can_map() -> bool:
    """Return whether files can be mapped here as safetensors stores them."""
    return sys.byteorder == "little"
