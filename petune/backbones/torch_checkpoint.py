"""Read the weights in a checkpoint of torch, as timm and training scripts write them, without running its code."""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from petune.base.errors import CheckpointError
from petune.base.text import plural, printable
from petune.sites.file_values import Entry, MappedFile, can_map

SUFFIXES = (".pt", ".pth", ".bin", ".tar", ".ckpt")
MAGIC = (b"PK\x03\x04", b"\x80\x02")
"""First bytes of a checkpoint: an archive since torch 1.6, a pickle before."""
HEADER_SIZE = 30
"""Bytes in front of the name of a record in an archive."""
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
        CheckpointError: It holds other objects, is damaged, has no weights, or weights that are not plain tensors.
    """
    loaded = _load(file)
    state, entry = _find_state(loaded)
    if state is None:
        raise CheckpointError(
            f"{file} does not contain a state_dict (names to tensors), neither directly nor under "
            f"{', '.join(STATE_KEYS)}. Save the model's own: torch.save(model.state_dict(), path)"
        )
    _check_plain(file, state)
    return without_wrappers(state), entry


def _check_plain(file: Path, state: Mapping[str, Tensor]) -> None:
    """Check that tensors have values, in the usual form.

    Raises:
        CheckpointError: Some are sparse, quantized, of a class of their own, or from the meta device.
    """
    kinds = {key: kind for key, tensor in state.items() if (kind := _unusual_kind(tensor))}
    if kinds:
        key, kind = next(iter(kinds.items()))
        raise CheckpointError(
            f"{file} has {plural(len(kinds), 'tensor')} that cannot be read as weights, such as {printable(key)}, "
            f"which {kind}. Save dense tensors of floating-point numbers: torch.save(model.state_dict(), path)"
        )


def _unusual_kind(tensor: Tensor) -> str:
    """Return why a tensor cannot be copied into a parameter; empty if it can."""
    if tensor.is_meta:
        return "has no values, because it was saved from the meta device"
    if tensor.is_quantized:
        return f"is quantized ({str(tensor.dtype).removeprefix('torch.')})"
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"is of a class of its own ({type(tensor).__name__})"
    if tensor.is_nested or tensor.layout != torch.strided:
        return f"is not dense ({'nested' if tensor.is_nested else str(tensor.layout).removeprefix('torch.')})"
    return ""


def check_checkpoint(file: Path, *, is_loaded: bool) -> None:
    """Check that a checkpoint is intact, without reading its values into memory.

    Args:
        file: The checkpoint.
        is_loaded: Another library has loaded it, so that only its checksums are checked.

    Raises:
        CheckpointError: It is damaged, or holds other objects than tensors.
    """
    with contextlib.suppress(zipfile.BadZipFile):
        _check_checksums(file)
    if not is_loaded:
        _load(file, "meta")


def map_torch_checkpoint(file: Path) -> tuple[MappedFile, dict[str, Tensor], str] | None:
    """Map a checkpoint instead of reading it.

    Returns:
        The file, and what `read_torch_checkpoint` returns, mapped. None if that is not possible: torch before 1.6 wrote
        it, it is no checkpoint, or a tensor is not stored in one piece.

    Raises:
        CheckpointError: It has other checksums than it records.
    """
    with contextlib.suppress(zipfile.BadZipFile):
        _check_checksums(file)
    with contextlib.suppress(Exception):  # the usual way says what is wrong
        state, entry = _find_state(_load(file, "meta"))
        if state is None or not can_map():
            return None
        sizes = _storage_sizes(file)
        mapped = MappedFile(file, {key: _entry_of(tensor, sizes) for key, tensor in state.items()})
        return mapped, without_wrappers(mapped.tensors), entry
    return None


def _check_checksums(file: Path) -> None:
    """Check the content of an archive, which torch does not when it reads it.

    Raises:
        BadZipFile: It is no archive.
        CheckpointError: It is damaged.
    """
    with zipfile.ZipFile(file) as archive:
        for record in archive.infolist():
            if not record.CRC:  # as torch writes them after torch.serialization.set_crc32_options(False)
                continue
            try:
                with archive.open(record) as opened:
                    while opened.read(2**20):
                        pass
            except (zipfile.BadZipFile, zlib.error, EOFError):
                raise CheckpointError(
                    f"{file} is damaged: {record.filename} in it has another checksum than was recorded. Download or "
                    "copy the file again"
                ) from None


def _entry_of(tensor: Tensor, sizes: Mapping[int, int]) -> Entry:
    """Return where a tensor is that was loaded to the meta device, for which torch keeps the positions of storages.

    Args:
        tensor: On the meta device.
        sizes: See `_storage_sizes`.
    """
    if not tensor.is_contiguous():
        raise NotImplementedError("a tensor is not stored in one piece")
    storage = tensor.untyped_storage()
    start = storage._checkpoint_offset
    if start is None or sizes.get(start) != storage.nbytes():
        raise NotImplementedError("torch did not keep the position")
    return start + int(tensor.storage_offset()) * tensor.dtype.itemsize, tuple(tensor.shape), tensor.dtype


def _storage_sizes(file: Path) -> dict[int, int]:
    """Return the bytes of each storage in an archive, by its position in the file.

    Raises:
        NotImplementedError: They are compressed, in another byte order than this machine's, or in another order than
            the one from which torch calculates the positions: the archive was unpacked and packed again.
    """
    with zipfile.ZipFile(file) as archive, file.open("rb") as opened:
        names = archive.namelist()
        stored = [r for r in archive.infolist() if r.filename.rpartition("/")[0].endswith("/data")]
        stored.sort(key=lambda record: record.header_offset)
        numbers = [int(record.filename.rpartition("/")[2]) for record in stored]
        is_calculated = any(name.endswith("/.format_version") for name in names)
        orders = [archive.read(name) for name in names if name.endswith("/byteorder")]
        is_packed = any(record.compress_type != zipfile.ZIP_STORED for record in stored)
        if is_packed or any(order != b"little" for order in orders) or (is_calculated and numbers != sorted(numbers)):
            raise NotImplementedError("the storages are not as torch writes them")
        return {_content_start(opened, record): record.file_size for record in stored}


def _content_start(archive: BinaryIO, record: zipfile.ZipInfo) -> int:
    """Return where the content of a record starts: after a header, whose last four bytes are the sizes of two texts."""
    archive.seek(record.header_offset + HEADER_SIZE - 4)
    len_name, len_extra = struct.unpack("<HH", archive.read(4))
    return int(record.header_offset + HEADER_SIZE + len_name + len_extra)


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
    with contextlib.suppress(Exception), torch.serialization.safe_globals(_harmless_types()):
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        return sorted("".join(c for c in name if c.isprintable()) for name in names)[:5]
    return []


def _harmless_types() -> list[Any]:
    """Return what training scripts save besides tensors and plain data: options, and paths among them.

    numpy's scalars are not among them, because a hostile dtype can make numpy read foreign memory.
    """
    return [argparse.Namespace, (pathlib.PurePosixPath, "pathlib.PosixPath")]
