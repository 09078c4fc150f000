"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009): torchvision's archive, Hugging Face's Parquet, or a download.

The MD5 of every archive and every unpacked file is checked before it is read, so its pickles are the published ones.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import pickle
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from petune.base.errors import DataError
from petune.base.network import reachable
from petune.data.cache import Allocate, cache_dir, decoded, file_key
from petune.data.dataset import Dataset, Split

FORMAT = 1
SIDE = 32


def load_cifar(name: str, data_dir: Path | None) -> Dataset:
    """Load `cifar10` or `cifar100` (fine labels).

    Args:
        name: `cifar10` or `cifar100`.
        data_dir: Looked at first; nothing is ever written there. Without it only the cache directory is, where
            downloads go.

    Raises:
        DataError: What is in `data_dir` is damaged; or nothing is there and the download server cannot be reached.
    """
    own = cache_dir() / "data"
    for place in (p for p in (data_dir, own) if p is not None):
        damaged = []
        for path in published_files(name, place):
            try:
                return _from_published(name, path)
            except DataError as error:
                damaged.append(str(error))
        files = parquet_files(name, place)
        if files is not None:
            return _from_parquet(name, files)
        if damaged and place != own:
            raise DataError("; ".join(damaged))
    return _download(name, data_dir, own)


def _torchvision_class(name: str) -> Any:
    from torchvision import datasets

    return {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]


def published_files(name: str, place: Path) -> list[Path]:
    """The unpacked folder and the archive, as torchvision names them, if they are there (whole or not)."""
    names = {"cifar10": ("cifar-10-batches-py", "cifar-10-python.tar.gz"),
             "cifar100": ("cifar-100-python", "cifar-100-python.tar.gz")}[name]  # fmt: skip
    return [place / part for part in names if (place / part).exists()]


def _from_published(name: str, path: Path) -> Dataset:
    cls = _torchvision_class(name)
    lists = {"train": cls.train_list, "test": cls.test_list, "meta": [(cls.meta["filename"], cls.meta["md5"])]}
    wanted = {file: md5 for entries in lists.values() for file, md5 in entries}
    try:
        content = _read_folder(path, wanted) if path.is_dir() else _read_archive(path, wanted, cls)
    except (OSError, EOFError, ValueError, KeyError, tarfile.TarError, zlib.error) as error:
        raise DataError(f"{path} must be the published {name} archive, but: {error}. Fetch it again") from None
    read = {part: [pickle.loads(content[file], encoding="latin1") for file, _ in lists[part]] for part in lists}
    parts = {part: _split(read[part]) for part in ("train", "test")}
    return _dataset(name, tuple(read["meta"][0][cls.meta["key"]]), str(path), parts["train"], parts["test"])


def _read_folder(folder: Path, wanted: Mapping[str, str]) -> dict[str, bytes]:
    content = {file: (folder / file).read_bytes() for file in wanted}
    for file, md5 in wanted.items():
        _check_md5(file, hashlib.md5(content[file], usedforsecurity=False).hexdigest(), md5)
    return content


def _read_archive(archive: Path, wanted: Mapping[str, str], cls: Any) -> dict[str, bytes]:
    """What is wanted of an archive whose own MD5 is right; it is never unpacked to the disk."""
    with archive.open("rb") as file:
        _check_md5(archive.name, hashlib.file_digest(file, "md5").hexdigest(), cls.tgz_md5)
    with tarfile.open(archive, "r:gz") as opened:
        found = {file: opened.extractfile(f"{cls.base_folder}/{file}") for file in wanted}
        return {file: member.read() for file, member in found.items() if member is not None}


def _check_md5(what: str, came: str, must: str) -> None:
    if came != must:
        raise ValueError(f"the MD5 of {what} is {came}, not {must}: it is damaged, cut short or another file")


def _split(batches: list[dict[str, Any]]) -> Split:
    pixels = np.concatenate([batch["data"] for batch in batches])
    images_NHWC = np.ascontiguousarray(pixels.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1))
    labels = [label for batch in batches for label in batch["labels" if "labels" in batch else "fine_labels"]]
    return Split.of(images_NHWC, np.asarray(labels, dtype=np.int64))


def parquet_files(name: str, place: Path) -> dict[str, list[Path]] | None:
    """The Parquet files of both splits, as Hugging Face lays them out, if they are there."""
    for root in (place / name, place if place.name == name else place / name / "data"):
        files = {part: sorted(root.glob(f"**/{part}*.parquet")) for part in ("train", "test")}
        if files["train"] and files["test"]:
            return files
    return None


def _from_parquet(name: str, files: dict[str, list[Path]]) -> Dataset:
    column = "label" if name == "cifar10" else "fine_label"
    parts = {}
    for part, paths in files.items():
        key = {"format": FORMAT, "column": column, "files": [file_key(p) for p in paths]}
        parts[part] = decoded(key, functools.partial(_decode_parquet, paths, column))
    classes = _class_names(files["train"][0], column)
    return _dataset(name, classes, str(files["train"][0].parent), parts["train"], parts["test"])


def _decode_parquet(paths: list[Path], column: str, allocate: Allocate) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    import pyarrow.parquet as pq
    from PIL import Image

    images: list[dict[str, Any]] = []
    labels: list[int] = []
    for path in paths:
        try:
            table = pq.read_table(path)
            images += table["img" if "img" in table.column_names else "image"].to_pylist()
            labels += np.asarray(table[column].to_pylist()).astype(np.int64, casting="same_kind").tolist()
        except Exception as error:  # Arrow has errors of its own below RuntimeError, MemoryError and others
            raise _no_parquet(path, column, error) from None
    pixels = allocate(len(images), SIDE)
    for row, image in enumerate(images):
        try:
            opened = Image.open(io.BytesIO(image["bytes"]))
            if opened.size != (SIDE, SIDE):
                raise ValueError(f"it is {opened.width}x{opened.height}")
            pixels[row] = np.asarray(opened.convert("RGB"))
        except Exception as error:  # Pillow raises a dozen types, and each means that this image is bad
            raise DataError(
                f"{paths[0].parent}: image {row} must be whole, {SIDE}x{SIDE}, but: {error}. Fetch it again"
            ) from None
    return np.asarray(labels, dtype=np.int64), np.arange(len(labels))


def _no_parquet(path: Path, column: str, error: Exception) -> DataError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return DataError(f"{path} must be Parquet with an image and a {column!r} column, but: {reason}. Fetch it again")


def _class_names(path: Path, column: str) -> tuple[str, ...]:
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_schema(path).metadata or {}
    except Exception as error:
        raise _no_parquet(path, column, error) from None
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][column]["names"]
    except (KeyError, ValueError, TypeError, RecursionError):
        names = None
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        return tuple(names)
    return tuple(str(i) for i in range(10 if column == "label" else 100))


def _download(name: str, data_dir: Path | None, target: Path) -> Dataset:
    from torchvision.datasets.utils import download_url

    cls = _torchvision_class(name)
    if not reachable(cls.url):
        looked = f"{data_dir} or {target}" if data_dir else str(target)
        raise DataError(
            f"{name} must be on disk or downloadable: found neither a whole {cls.filename} nor {name}/train*.parquet "
            f"in {looked}, and {cls.url} cannot be reached. Point --data-dir or PETUNE_DATA at a folder that "
            "holds it"
        )
    try:
        target.mkdir(parents=True, exist_ok=True)
        download_url(cls.url, target, cls.filename, cls.tgz_md5)
    except (RuntimeError, OSError) as error:
        raise DataError(f"downloading {cls.url} to {target} failed: {error}") from None
    return _from_published(name, target / cls.filename)


def _dataset(name: str, classes: tuple[str, ...], source: str, train: Split, test: Split) -> Dataset:
    return Dataset(name, classes, source, "light", train, train.take(np.arange(0)), test).checked()
