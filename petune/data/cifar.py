"""Load CIFAR-10 and CIFAR-100 (Krizhevsky, 2009) from torchvision's archive, Hugging Face's Parquet, or a download.

The archive is never unpacked to disk. The MD5 of every archive and unpacked file is checked before it is unpickled.
"""

from __future__ import annotations

import hashlib
import pickle
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from petune.base.errors import DataError
from petune.base.network import reachable
from petune.data.cache import cache_dir
from petune.data.cifar_parquet import SIDE, load_parquet, parquet_files
from petune.data.dataset import Dataset, Split, Target


def load_cifar(name: str, data_dir: Path | None) -> Dataset:
    """Load `cifar10` or `cifar100` (fine labels).

    Args:
        name: `cifar10` or `cifar100`.
        data_dir: Where to look first; never written to. Downloads go to the cache directory.

    Raises:
        DataError: The files in `data_dir` are damaged, or there are none and the download server cannot be reached.
    """
    own = cache_dir() / "data"
    for root in (data_dir, own):
        if root is None:
            continue
        damaged = []
        for path in published_files(name, root):
            try:
                return _load_published(name, path)
            except DataError as error:
                damaged.append(str(error))
        parquet = parquet_files(name, root)
        if parquet is not None:
            return _dataset(name, *load_parquet(name, parquet))
        if damaged and root != own:
            raise DataError("; ".join(damaged))
    return _download(name, data_dir, own)


def published_files(name: str, root: Path) -> list[Path]:
    """Return torchvision's unpacked folder and its archive, if they exist (complete or not)."""
    names = {
        "cifar10": ("cifar-10-batches-py", "cifar-10-python.tar.gz"),
        "cifar100": ("cifar-100-python", "cifar-100-python.tar.gz"),
    }
    return [root / file for file in names[name] if (root / file).exists()]


def _torchvision_class(name: str) -> Any:
    from torchvision import datasets

    return {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]


def _load_published(name: str, path: Path) -> Dataset:
    cls = _torchvision_class(name)
    md5_of = dict([*cls.train_list, *cls.test_list, (cls.meta["filename"], cls.meta["md5"])])
    try:
        files = _read_folder(path, md5_of) if path.is_dir() else _read_archive(path, md5_of, cls)
    except (OSError, EOFError, ValueError, KeyError, tarfile.TarError, zlib.error) as error:
        raise DataError(f"{path} is not the published {name} archive: {error}. Download it again") from None
    batches = {file: pickle.loads(content, encoding="latin1") for file, content in files.items()}
    train = _split([batches[file] for file, _ in cls.train_list])
    test = _split([batches[file] for file, _ in cls.test_list])
    classes = batches[cls.meta["filename"]][cls.meta["key"]]
    return _dataset(name, tuple(classes), str(path), train, test)


def _read_folder(folder: Path, md5_of: dict[str, str]) -> dict[str, bytes]:
    files = {file: (folder / file).read_bytes() for file in md5_of}
    for file, content in files.items():
        _check_md5(file, hashlib.md5(content, usedforsecurity=False).hexdigest(), md5_of[file])
    return files


def _read_archive(archive: Path, md5_of: dict[str, str], cls: Any) -> dict[str, bytes]:
    with archive.open("rb") as file:
        _check_md5(archive.name, hashlib.file_digest(file, "md5").hexdigest(), cls.tgz_md5)
    with tarfile.open(archive, "r:gz") as tar:
        members = {file: tar.extractfile(f"{cls.base_folder}/{file}") for file in md5_of}
        return {file: member.read() for file, member in members.items() if member is not None}


def _check_md5(file: str, actual: str, expected: str) -> None:
    if actual != expected:
        raise ValueError(f"the MD5 of {file} is {actual}, expected {expected}")


def _split(batches: list[dict[str, Any]]) -> Split:
    pixels = np.concatenate([batch["data"] for batch in batches])
    images_NHWC = np.ascontiguousarray(pixels.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1))
    labels = [label for batch in batches for label in batch["labels" if "labels" in batch else "fine_labels"]]
    return Split.of(images_NHWC, np.asarray(labels, dtype=np.int64))


def _download(name: str, data_dir: Path | None, target: Path) -> Dataset:
    from torchvision.datasets.utils import download_url

    cls = _torchvision_class(name)
    if not reachable(cls.url):
        searched = f"{data_dir} and {target}" if data_dir else str(target)
        raise DataError(
            f"{name} not found: neither {cls.filename} nor {name}/train*.parquet is in {searched}, and {cls.url} "
            "cannot be reached. Set data_dir or PETUNE_DATA to the directory that holds it",
            cli_hint="Name the directory with --data-dir",
        )
    try:
        target.mkdir(parents=True, exist_ok=True)
        download_url(cls.url, target, cls.filename, cls.tgz_md5)
    except (RuntimeError, OSError) as error:
        raise DataError(f"downloading {cls.url} to {target} failed: {error}") from None
    return _load_published(name, target / cls.filename)


def _dataset(name: str, classes: tuple[str, ...], source: str, train: Split, test: Split) -> Dataset:
    target = Target("class", classes)
    return Dataset(name, target, source, "light", train, train.take(np.arange(0)), test).validated()
