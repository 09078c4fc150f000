"""Store frozen weights in bfloat16 while training in bfloat16: autocast would convert them again in every forward."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from petune.base.errors import CheckpointError
from petune.sites.file_values import file_slice_of, keep_rounded, original_values, read_layer_by_layer
from petune.training.speed.verify import same_logits

CAST_BY_AUTOCAST = (F.linear, torch.conv2d, F.conv2d)
"""Autocast converts everything that these compute with, so a weight that is converted already gives the same bits."""
FORMAT_FREE = {"shape", "ndim", "device", "requires_grad", "is_cuda", "grad_fn", "data_ptr"}
"""Attributes of a weight that do not depend on its number format."""
FREE_DISK = 10
"""The originals go to disk only if this many times their size is free, since checkpoints need room as well."""


@contextmanager
def store_in_bf16(
    model: nn.Module, sample_logits: Callable[[], Tensor], directory: Path | None = None
) -> Iterator[int]:
    """Inside, frozen weights that only linear layers and convolutions read are in bfloat16.

    Args:
        model: Its parameters keep their identity.
        sample_logits: Returns the logits of some images under autocast, always the same ones. It shows how each weight
            is used: one that is read in another way, as by DoRA, stays in float32; all do if the logits would change.
        directory: Where the originals wait, in a file without a name that disappears with the process. They wait in
            memory if this is None, not writable, or short of room.

    Yields:
        The size of the bfloat16 weights in bytes.
    """
    with read_layer_by_layer(model), _WeightUses() as uses:
        expected = sample_logits()
    plain = [p for p in model.parameters() if type(p) is nn.Parameter]  # others are quantized
    frozen = [p for p in plain if not p.requires_grad and p.dtype == torch.float32]
    usable = [p for p in frozen if id(p) in uses.cast and id(p) not in uses.read]
    chosen = [p for p in usable if file_slice_of(p) is None]
    mapped = {p: p.data for p in usable if file_slice_of(p) is not None}
    file = _save(chosen, directory) if chosen and directory is not None else None
    in_memory = [] if file is not None else [p.data.cpu() for p in chosen]  # a GPU's memory is for what computes
    try:
        for p in usable:
            p.data = original_values(p).to(torch.bfloat16)
        if usable and not same_logits(expected, sample_logits):
            _restore(chosen, in_memory, file)
            _map_again(mapped)
        for p in mapped:
            keep_rounded(p, p.data)
        yield sum(2 * p.numel() for p in usable if p.dtype == torch.bfloat16)
    finally:
        _restore(chosen, in_memory, file)
        _map_again(mapped)
        if file is not None:
            file.close()


def _map_again(mapped: Mapping[nn.Parameter, Tensor]) -> None:
    for p, values in mapped.items():
        p.data = values


class _WeightUses(TorchFunctionMode):
    """Collects the ids of tensors that autocast converts, and of parameters that anything else reads."""

    def __init__(self) -> None:
        super().__init__()
        self.cast = set[int]()
        self.read = set[int]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(getattr(func, "__self__", func), "__name__", "")
        if func in CAST_BY_AUTOCAST:
            self.cast.update(id(t) for t in (*args[1:3], kwargs.get("weight"), kwargs.get("bias")))
        elif name not in FORMAT_FREE:
            self.read.update(id(t) for t in tree_flatten((args, kwargs))[0] if isinstance(t, nn.Parameter))
        return func(*args, **kwargs)


def _save(parameters: Sequence[nn.Parameter], directory: Path) -> IO[bytes] | None:
    """Write the values to a file without a name; None if that is not possible."""
    try:
        if shutil.disk_usage(directory).free < FREE_DISK * sum(p.data.nbytes for p in parameters):
            return None
        file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115  (closed when training ends)
    except OSError:
        return None
    try:
        for p in parameters:
            file.write(_bytes_of(p.data.cpu().contiguous()))
        file.flush()
    except OSError:
        with contextlib.suppress(OSError):  # closing tries to write the rest again
            file.close()
        return None
    return file


def _restore(parameters: Sequence[nn.Parameter], in_memory: Sequence[Tensor], file: IO[bytes] | None) -> None:
    """Give the parameters their values again; if they have them already, nothing changes."""
    if file is not None:
        file.seek(0)
    for number, p in enumerate(parameters):
        value = in_memory[number] if file is None else _read(file, p.shape)
        p.data = value.to(p.device)


def _read(file: Any, shape: torch.Size) -> Tensor:
    value = torch.empty(shape)
    if file.readinto(_bytes_of(value)) != value.nbytes:
        raise CheckpointError(
            "the backbone's original weights could not be read again from the run directory's disk. "
            "The last checkpoint is intact: run again to resume",
            cli_hint="Use --resume",
        )
    return value


def _bytes_of(x: Tensor) -> Any:
    return x.view(-1).view(torch.uint8).numpy()
