"""Tar shards of webdataset as a table: a row for each key, a column for each extension and each key of JSON files."""

from __future__ import annotations

import io
import json
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from petune.base.errors import DataError
from petune.data.cache import file_key
from petune.data.images import UNSUPPORTED_SUFFIXES, supported_suffixes
from petune.data.manifest import digest, file_digest
from petune.data.split_names import parse_split_name
from petune.data.tables.joined import SPLIT
from petune.data.tables.parquet import PART
from petune.data.tables.table import ColumnType
from petune.data.tables.text import kind_of

BLOCK = 512
"""Bytes of a block in a tar file, which ends with at least one block of zeros."""
DAMAGED = (tarfile.TarError, EOFError, OSError, zlib.error)


@dataclass(frozen=True)
class Shard:
    """Samples of a tar file.

    Attributes:
        file: The tar file.
        samples: By key: the texts by extension and the values of JSON files; None for images, which stay in the file.
    """

    file: Path
    samples: dict[str, dict[str, Any]]


class WdsTable:
    """All samples of some shards, each once; see `Table`.

    Args:
        files: The shards, in order.
        title: The dataset as it is written on the command line.

    Raises:
        DataError: A shard is damaged or cut short, or holds a file twice.
    """

    def __init__(self, files: Sequence[Path], title: str) -> None:
        self.title = title
        self.folder = Path()
        self._shards = [_index(file, *file_key(file)) for file in files]
        self._rows = [(shard, key) for shard in self._shards for key in shard.samples]
        self._splits = _splits_of(files)
        found = _merged_images([shard.samples[key] for shard, key in self._rows])
        self.columns = (*found, *([SPLIT] if self._splits and SPLIT not in found else []))

    def __len__(self) -> int:
        return len(self._rows)

    def type_of(self, column: str) -> ColumnType:
        """Return the type of a column: an image by its extension, whole numbers, text, or JSON values."""
        if is_image(column):
            return ColumnType("image")
        return ColumnType(kind_of(self.values(column)))

    def values(self, column: str) -> list[Any]:
        """Return the values of a column; None where a sample has no such file or key."""
        if column == SPLIT and self._splits:
            return [self._splits[shard.file] for shard, _ in self._rows]
        return [shard.samples[key].get(column) for shard, key in self._rows]

    def contents(self, column: str) -> Iterator[list[Any]]:
        """Yield the bytes of images, or arrays; a shard is in memory at a time.

        Raises:
            DataError: A shard changed since it was listed.
        """
        for shard in self._shards:
            found: dict[str, Any] = {}
            try:
                with tarfile.open(shard.file) as tar:
                    for member in tar:
                        key, extension = _split_name(member.name)
                        if member.isfile() and extension in column.split(";") and key in shard.samples:
                            found[key] = _image(tar.extractfile(member), extension)
            except DAMAGED as error:
                raise _damaged(shard.file, error) from None
            images = [found.get(key) for key in shard.samples]
            for start in range(0, len(images), PART):
                yield images[start : start + PART]

    def row_name(self, row: int) -> str:
        """Return the shard and the key."""
        shard, key = self._rows[row]
        return f"{shard.file.name}/{key}"

    def keys(self) -> Sequence[str] | None:
        """Return shard and key of each row."""
        return [f"{shard.file}/{key}" for shard, key in self._rows]

    def version(self) -> Any:
        """Return path, size and time of the shards."""
        return [file_key(shard.file) for shard in self._shards]

    def digest(self) -> str:
        """Return a digest of the shards."""
        return digest([file_digest(shard.file) for shard in self._shards])

    def check_keys(self) -> None:
        """Check that no sample merges several images whose names differ after the first dot only.

        Raises:
            DataError: One does.
        """
        for shard, key in self._rows:
            dotted = [name for name in shard.samples[key] if is_image(name) and "." in name]
            suffixes = [name.rpartition(".")[2] for name in dotted]
            if len({*suffixes}) < len(dotted):
                raise DataError(
                    f"{shard.file}: keys end at the first dot, so {key}.{dotted[0]} and {key}.{dotted[1]} are one "
                    f"sample. Rename them if they are two; if they are two images of one sample, choose: "
                    f"image={dotted[0]}"
                )


def _merged_images(samples: Sequence[dict[str, Any]]) -> list[str]:
    """Return the columns of samples. If each has one image, whose extensions differ, they are one column: `jpg;png`."""
    columns = list(dict.fromkeys(name for sample in samples for name in sample))
    images = [name for name in columns if is_image(name) and "." not in name]
    if len(images) < 2 or any(sum(name in sample for name in images) != 1 for sample in samples):
        return columns
    return [";".join(images), *(name for name in columns if name not in images)]


def is_image(extension: str) -> bool:
    """Return True for the extension of an image or an array: `jpg`, `left.png`, `npy`, `jpg;png`."""
    return f".{re.split('[.;]', extension)[-1]}" in supported_suffixes() | UNSUPPORTED_SUFFIXES


@lru_cache(maxsize=1024)
def _index(file: Path, _resolved: str, _size: int, _time_ns: int) -> Shard:
    """Return the samples of a shard; keys need not be in order."""
    samples: dict[str, dict[str, Any]] = {}
    seen: set[tuple[str, str]] = set()
    try:
        with tarfile.open(file) as tar:
            for member in tar:
                key, extension = _split_name(member.name)
                if not member.isfile() or not extension:
                    continue
                sample = samples.setdefault(key, {})
                if (key, extension) in seen:
                    raise DataError(f"{file} holds {key}.{extension} twice. Write it once")
                seen.add((key, extension))
                if is_image(extension):
                    sample[extension] = None
                else:
                    content = tar.extractfile(member)
                    _add_text(sample, extension, content.read() if content else b"", f"{file}: {member.name}")
            _check_rest(tar)
    except DAMAGED as error:
        raise _damaged(file, error) from None
    _check_end(file)
    return Shard(file, samples)


def _add_text(sample: dict[str, Any], extension: str, content: bytes, where: str) -> None:
    """Add the values of a file that is no image: its text, or the keys of a JSON object that no file is named like."""
    try:
        if extension == "json":
            values = json.loads(content)
            if isinstance(values, dict):
                sample.update({name: value for name, value in values.items() if name not in sample})
            return
        text = content.decode("utf-8").strip()
    except (ValueError, RecursionError):
        if extension in {"json", "cls", "txt"}:
            raise DataError(
                f"{where} is not {'JSON' if extension == 'json' else 'UTF-8 text'}. Write it again"
            ) from None
        return
    sample[extension] = int(text) if extension == "cls" and text.lstrip("-").isdecimal() else text


def _split_name(name: str) -> tuple[str, str]:
    """Return key and extension as webdataset does: the key ends at the first dot of the file's name."""
    from webdataset.tariterators import base_plus_ext

    is_meta = name.startswith("__") and name.endswith("__")
    key, extension = (None, None) if is_meta else base_plus_ext(name)
    return key or "", (extension or "").lower()


def _check_end(file: Path) -> None:
    """Check for the zeros at the end, without which a shard was cut between two files."""
    if file.suffix.lower() != ".tar":
        return  # a cut compressed file cannot be unpacked
    with file.open("rb") as content:
        content.seek(-min(BLOCK, file.stat().st_size), io.SEEK_END)
        if content.read().strip(b"\0") or file.stat().st_size % BLOCK:
            raise _damaged(file, EOFError("the end of the archive is missing"))


def _check_rest(tar: tarfile.TarFile) -> None:
    """Check that only the padding of a tar file follows what was read: tarfile ends quietly at a damaged header.

    Raises:
        EOFError: More follows, or more zeros than padding, as in a download that was not completed.
    """
    content: Any = tar.fileobj
    content.seek(tar.offset)
    num_zeros = 0
    while chunk := content.read(1 << 20):
        if chunk.strip(b"\0"):
            raise EOFError(f"after byte {tar.offset:,} there is data that is no file")
        num_zeros += len(chunk)
    if num_zeros > tarfile.RECORDSIZE + 2 * BLOCK:
        raise EOFError(f"it ends with {num_zeros:,} zero bytes, as if a part was not written")


def _damaged(file: Path, error: Exception) -> DataError:
    return DataError(f"{file} is cut short or damaged ({error}). Copy or download it again")


def _image(content: Any, extension: str) -> Any:
    data = content.read()
    if not extension.endswith("npy"):
        return data
    try:
        return np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError):
        return data  # decoding reports it


def _splits_of(files: Sequence[Path]) -> dict[Path, str]:
    """Return the split of each shard by its name, `train-0003.tar`; empty if not all have one or none is train."""
    names = {file: parse_split_name(file.name.partition(".")[0]) for file in files}
    splits = {file: name.split for file, name in names.items() if name is not None and name.is_word}
    return splits if len(splits) == len(files) and "train" in splits.values() else {}
