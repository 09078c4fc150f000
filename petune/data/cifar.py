"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009): torchvision's archive, Hugging Face's Parquet, or a download.

torchvision checks the MD5 of every file it reads, so its pickles are the published ones or are refused.
"""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from petune.data.cache import Allocate, cache_dir, decoded, file_key
from petune.data.dataset import Dataset, Split
from petune.errors import DataError
from petune.network import reachable

FORMAT = 1
SIDE = 32


def load_cifar(name: str, data_dir: Path | None) -> Dataset:
    """Load `cifar10` or `cifar100` (fine labels).

    Args:
        name: `cifar10` or `cifar100`.
        data_dir: Looked at first; without it only the cache directory is, where downloads go.

    Raises:
        DataError: Nothing is there and the download server cannot be reached.
    """
    places = [p for p in (data_dir, cache_dir() / "data") if p is not None]
    for place in places:
        archive = _archive(name, place)
        if archive is not None:
            return _from_torchvision(name, place, archive)
        files = _parquet_files(name, place)
        if files is not None:
            return _from_parquet(name, files)
    return _download(name, places)


def _torchvision_class(name: str) -> Any:
    from torchvision import datasets

    return {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]


def _archive(name: str, place: Path) -> Path | None:
    stem = {"cifar10": ("cifar-10-batches-py", "cifar-10-python.tar.gz"),
            "cifar100": ("cifar-100-python", "cifar-100-python.tar.gz")}[name]  # fmt: skip
    return next((place / part for part in stem if (place / part).exists()), None)


def _from_torchvision(name: str, place: Path, archive: Path) -> Dataset:
    cls = _torchvision_class(name)

    def read(train: bool) -> Any:
        try:  # download=True only unpacks here: the archive is there and its MD5 is checked first
            return cls(place, train=train, download=archive.suffix == ".gz")
        except (RuntimeError, OSError, EOFError) as error:
            raise DataError(f"{archive} must be the published {name} archive, but: {error}") from None

    parts, classes = [], ()
    for train in (True, False):
        data = read(train)
        parts.append(Split.of(data.data, np.asarray(data.targets, dtype=np.int64)))
        classes = tuple(data.classes)
    return _dataset(name, classes, str(archive), parts[0], parts[1])


def _parquet_files(name: str, place: Path) -> dict[str, list[Path]] | None:
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


def _decode_parquet(paths: list[Path], column: str, allocate: Allocate) -> NDArray[np.int64]:
    import pyarrow.parquet as pq
    from PIL import Image

    pictures: list[dict[str, Any]] = []
    labels: list[int] = []
    for path in paths:
        try:
            table = pq.read_table(path)
            pictures += table["img" if "img" in table.column_names else "image"].to_pylist()
            labels += [int(label) for label in table[column].to_pylist()]
        except (KeyError, OSError, ValueError, TypeError) as error:
            raise DataError(
                f"{path} must be Parquet with an image and a {column!r} column, but: {error}. Fetch it again"
            ) from None
    images = allocate(len(pictures), SIDE)
    for row, picture in enumerate(pictures):
        try:
            images[row] = np.asarray(Image.open(io.BytesIO(picture["bytes"])).convert("RGB"))
        except Exception as error:  # Pillow raises a dozen types, and each means that this picture is bad
            raise DataError(
                f"{paths[0].parent}: picture {row} must be whole, {SIDE}x{SIDE}, but: {error}. Fetch it again"
            ) from None
    return np.asarray(labels, dtype=np.int64)


def _class_names(path: Path, column: str) -> tuple[str, ...]:
    import pyarrow.parquet as pq

    metadata = pq.read_schema(path).metadata or {}
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return tuple(features[column]["names"])
    except (KeyError, ValueError, TypeError):
        return tuple(str(i) for i in range(10 if column == "label" else 100))


def _download(name: str, places: list[Path]) -> Dataset:
    cls = _torchvision_class(name)
    if not reachable(cls.url):
        looked = " or ".join(str(p) for p in places)
        raise DataError(
            f"{name} must be on disk or downloadable: found neither {cls.filename} nor {name}/train*.parquet "
            f"in {looked}, and {cls.url} cannot be reached. Point --data-dir or PETUNE_DATA at a folder that "
            "holds it"
        )
    target = cache_dir() / "data"
    target.mkdir(parents=True, exist_ok=True)
    try:
        cls(target, download=True)
    except (RuntimeError, OSError) as error:
        raise DataError(f"downloading {cls.url} to {target} failed: {error}") from None
    return _from_torchvision(name, target, target / cls.filename)


def _dataset(name: str, classes: tuple[str, ...], source: str, train: Split, test: Split) -> Dataset:
    return Dataset(name, classes, source, "light", train, train.take(np.arange(0)), test).checked()
