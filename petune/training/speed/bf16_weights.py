"""Frozen weights in bfloat16 while training in bfloat16: autocast would make the same copy anew at every forward."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from petune.base.errors import CheckpointError

CASTING = (F.linear, torch.conv2d, F.conv2d)
"""Autocast casts all that these compute with, so that a weight that is cast already gives the same bits."""
HARMLESS = {"shape", "ndim", "device", "requires_grad", "is_cuda", "grad_fn", "data_ptr"}
"""What may be asked of a weight: it does not depend on the number format."""


@contextmanager
def store_in_bf16(model: nn.Module, forward: Callable[[], Tensor], directory: Path | None = None) -> Iterator[int]:
    """Inside, frozen weights that are only multiplied with are stored in bfloat16; afterwards they are as they were.

    Args:
        model: Its parameters keep their identity.
        forward: Logits of some images under autocast, always the same ones. It shows how each weight is used: one
            that is read otherwise, as DoRA does, stays in float32, and so do all if the logits should differ.
        directory: Where the values wait meanwhile, in a file that has no name and is gone with the process; in memory
            where there is none, or no room.

    Yields:
        How many bytes the copies take.
    """
    with _Uses() as uses:
        expected = forward()
    chosen = [p for p in _frozen(model) if id(p) in uses.cast and id(p) not in uses.read]
    originals = _Originals(chosen, directory)
    try:
        for p in chosen:
            p.data = p.data.to(torch.bfloat16)
        if chosen and not still_gives(expected, forward):
            originals.put_back()
        yield sum(2 * p.numel() for p in chosen if p.dtype == torch.bfloat16)
    finally:
        originals.put_back()
        originals.close()


class _Originals:
    """The values of parameters, out of the way."""

    def __init__(self, parameters: Sequence[nn.Parameter], directory: Path | None) -> None:
        self.parameters = parameters
        self.file: Any = _written(parameters, directory) if directory is not None and parameters else None
        in_memory = parameters if self.file is None else ()
        self.values = [p.data.cpu() for p in in_memory]  # a GPU's memory is not for what is not computed with

    def put_back(self) -> None:
        """Give the parameters their values again."""
        if self.file is not None:
            self.file.seek(0)
        for number, p in enumerate(self.parameters):
            p.data = (self._read(p) if self.file is not None else self.values[number]).to(p.device)

    def close(self) -> None:
        """Forget them."""
        self.values = []
        if self.file is not None:
            self.file.close()

    def _read(self, p: nn.Parameter) -> Tensor:
        value = torch.empty(p.shape)
        if self.file.readinto(_bytes(value)) != value.nbytes:
            raise CheckpointError(
                "the backbone's weights must be read again from the run directory's disk, but it gives too few bytes; "
                "go on with --resume"
            )
        return value


def _bytes(x: Tensor) -> Any:
    return x.view(-1).view(torch.uint8).numpy()


def _written(parameters: Sequence[nn.Parameter], directory: Path) -> Any:
    """The file, or None where it cannot be written, or checkpoints might want the room."""
    try:
        if shutil.disk_usage(directory).free < 10 * sum(p.data.nbytes for p in parameters):
            return None
        file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115  (it lives as long as the originals)
    except OSError:
        return None
    try:
        for p in parameters:
            file.write(_bytes(p.data.cpu().contiguous()))
        file.flush()
    except OSError:
        with contextlib.suppress(OSError):  # what is not written yet is tried again
            file.close()
        return None
    return file


class _Uses(TorchFunctionMode):
    """Which tensors are arguments of casting operations, and which of others, by identity."""

    def __init__(self) -> None:
        super().__init__()
        self.cast, self.read = set[int](), set[int]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(getattr(func, "__self__", func), "__name__", "")
        if func in CASTING:
            weights = [*args[1:3], *((kwargs or {}).get(key) for key in ("weight", "bias"))]
            self.cast.update(id(t) for t in weights)
        elif name not in HARMLESS:
            self.read.update(id(t) for t in tree_flatten((args, kwargs))[0] if isinstance(t, nn.Parameter))
        return func(*args, **(kwargs or {}))


def _frozen(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if not p.requires_grad and p.dtype == torch.float32]


def still_gives(expected: Tensor, forward: Callable[[], Tensor]) -> bool:
    """Whether a changed model's logits are the same bits; not where it cannot compute them."""
    try:
        return torch.equal(forward(), expected)
    except RuntimeError:  # two dtypes met outside of autocast, or the processor lacks a kernel for these sizes
        return False
