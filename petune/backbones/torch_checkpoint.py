"""Read the weights in a checkpoint of torch, as timm and training scripts write them, without running its code."""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from petune.base.errors import CheckpointError
from petune.sites.file_values import Entry, MappedFile, can_map

SUFFIXES = (".pt", ".pth", ".bin", ".tar", ".ckpt")
MAGIC = (b"PK\x03\x04", b"\x80\x02")
"""First bytes of a checkpoint: an archive since torch 1.6, a pickle before."""
STATE_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict", "module")
"""Entries that hold the weights, in the order in which timm looks for them: averaged weights first."""
WRAPPERS = ("module.", "_orig_mod.")
"""Starts of keys that DistributedDataParallel and torch.compile add."""
AVERAGED_COUNT = "n_averaged"
"""The number of averaged steps that `torch.optim.swa_utils.AveragedModel` keeps beside the weights."""


def is_torch_checkpoint(file: Path) -> bool:
    """Return whether a file is a checkpoint of torch, by its first bytes or its name, and not safetensors."""
    with file.open("rb") as opened:
        start = opened.read(9)
    if start[8:] == b"{":  # the header of a safetensors file, whatever it is called
        return False
    return start.startswith(MAGIC) or file.suffix in SUFFIXES


def read_torch_checkpoint(file: Path) -> tuple[dict[str, Tensor], str]:
    """Return the weights in a checkpoint by state_dict key, and the entry that held them, empty if there is none.

    Of other objects only those of `_harmless_types` are built, and dropped.

    Raises:
        CheckpointError: It holds other objects, is damaged, or has no weights.
    """
    loaded = _load(file)
    state, entry = _find_state(loaded)
    if state is None:
        raise CheckpointError(
            f"{file} does not contain a state_dict (names to tensors), neither directly nor under "
            f"{', '.join(STATE_KEYS)}. Save the model's own: torch.save(model.state_dict(), path)"
        )
    return without_wrappers(state), entry


def map_torch_checkpoint(file: Path) -> tuple[MappedFile, dict[str, Tensor], str] | None:
    """Map a checkpoint instead of reading it.

    Returns:
        The file, and what `read_torch_checkpoint` returns, mapped. None if that is not possible: torch before 1.6 wrote
        it, it is damaged, or a tensor is not stored in one piece.
    """
    with contextlib.suppress(Exception):  # the usual way says what is wrong
        state, entry = _find_state(_load(file, "meta"))
        if state is None or not can_map() or not _is_intact(file):
            return None
        mapped = MappedFile(file, {key: _entry_of(tensor) for key, tensor in state.items()})
        return mapped, without_wrappers(mapped.tensors), entry
    return None


def _entry_of(tensor: Tensor) -> Entry:
    """Return where a tensor is that was loaded to the meta device, for which torch keeps the positions of storages."""
    if not tensor.is_contiguous():
        raise NotImplementedError("a tensor is not stored in one piece")
    start = tensor.untyped_storage()._checkpoint_offset
    if start is None:
        raise NotImplementedError("torch did not keep the position")
    return start + int(tensor.storage_offset()) * tensor.dtype.itemsize, tuple(tensor.shape), tensor.dtype


def _is_intact(file: Path) -> bool:
    """Return whether an archive has the checksums that it records, and numbers in this machine's byte order."""
    with zipfile.ZipFile(file) as archive:
        orders = [name for name in archive.namelist() if name.endswith("/byteorder")]
        return archive.testzip() is None and all(archive.read(name) == b"little" for name in orders)


def _find_state(loaded: Any) -> tuple[dict[str, Tensor] | None, str]:
    """Return the first dict of tensors, directly or in an entry of an entry, and the path of its entry."""
    if not isinstance(loaded, dict) or not loaded:
        return None, ""
    entry = next((key for key in STATE_KEYS if isinstance(loaded.get(key), dict)), None)
    if entry is not None:
        state, inner = _find_state(loaded[entry])
        return state, f"{entry}.{inner}" if inner else entry
    return (loaded if all(isinstance(value, Tensor) for value in loaded.values()) else None), ""


def without_wrappers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights without the starts that wrappers add, if all keys have them: `module.blocks.0…`."""
    tensors = {key: tensor for key, tensor in state.items() if key != AVERAGED_COUNT}
    while True:
        wrapper = next((w for w in WRAPPERS if tensors and all(key.startswith(w) for key in tensors)), None)
        if wrapper is None:
            return tensors
        tensors = {key.removeprefix(wrapper): tensor for key, tensor in tensors.items()}


def _load(file: Path, device: str = "cpu") -> Any:
    import torch

    try:
        with torch.serialization.safe_globals(_harmless_types()):
            return torch.load(file, map_location=device, weights_only=True)
    except Exception as error:  # the unpickler raises many types on other files: KeyError, IndexError, …
        unknown = _unknown_types(file)
        problem = f"it holds objects that are not read: {', '.join(unknown)}" if unknown else "it is damaged"
        reason = "" if unknown else f" ({type(error).__name__})"
        raise CheckpointError(
            f"cannot read {file} as a checkpoint of tensors only (no code is run): {problem}, or is no such "
            f"checkpoint{reason}. Save the weights alone: torch.save(model.state_dict(), path)"
        ) from None


def _unknown_types(file: Path) -> list[str]:
    """Return the names of types and functions in a checkpoint that are not built; empty if they cannot be listed."""
    import torch

    with contextlib.suppress(Exception), torch.serialization.safe_globals(_harmless_types()):
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        return sorted("".join(c for c in name if c.isprintable()) for name in names)[:5]
    return []


def _harmless_types() -> list[Any]:
    """Return what training scripts save besides tensors and plain data: options, and paths among them.

    numpy's scalars are not among them, because a hostile dtype can make numpy read foreign memory.
    """
    return [argparse.Namespace, (pathlib.PurePosixPath, "pathlib.PosixPath")]
