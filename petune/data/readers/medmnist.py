"""The datasets `medmnist:NAME`: the 2D sets of MedMNIST (Yang et al., 2023, arXiv:2110.14795), from their npz files.

Legend: N images, S side in pixels.
"""

from __future__ import annotations

import zipfile
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from petune.base.errors import ConfigError, DataError, MissingExtra, UnknownName
from petune.base.files import whole_file
from petune.base.network import reachable
from petune.data.cache import Allocate, cache_dir, cached_split, file_key
from petune.data.dataset import Dataset, Split, Target
from petune.data.reader import DatasetReader, ReadContext, ReaderConfig

FORMAT = 1
CHUNK = 1024
CITATION = "Yang et al., MedMNIST v2, Scientific Data 10:41 (2023), arXiv:2110.14795"


class MedmnistConfig(ReaderConfig):
    """Options of a dataset of MedMNIST.

    Attributes:
        size: Side of the images in pixels, which decides the file: `pathmnist.npz` has 28, `pathmnist_64.npz` has 64.
    """

    size: Literal[28, 64, 128, 224] = 28


class MedmnistReader(DatasetReader[MedmnistConfig]):
    """A dataset of MedMNIST."""

    about = "12 sets of medical images, 28 to 224 pixels; `petune datasets medmnist` lists them"
    needs = "petune[data], and a file in data_dir or a download"
    argument = "NAME"

    @classmethod
    def arguments(cls) -> dict[str, str]:
        """Return the names of the 2D sets, each with a line about it.

        Raises:
            MissingExtra: medmnist is not installed.
        """
        return {name: _about(info) for name, info in _all_info().items() if not _is_3d(name)}

    def load(self, context: ReadContext) -> Dataset:
        """Unpack the images once into the cache; download the file if it is not here."""
        info = self._info()
        file = self._find(context.data_dir) or self._download(info, context.data_dir)
        target = _target(info)
        parts = {part: self._read(file, part, target) for part in ("train", "val", "test")}
        return Dataset(
            f"{self.name or 'medmnist'}:{self.argument_value}",
            target,
            str(file),
            "light",
            parts["train"],
            parts["val"],
            parts["test"],
            license=str(info["license"]),
            citation=CITATION,
        )

    def target(self, context: ReadContext) -> Target:
        """Return the labels as medmnist lists them."""
        return _target(self._info())

    def find(self, data_dir: Path | None) -> str | None:
        """Return the npz file."""
        self._info()
        file = self._find(data_dir)
        return str(file) if file else None

    @property
    def _file_name(self) -> str:
        size = self.config.size
        return f"{self.argument_value}{'' if size == 28 else f'_{size}'}.npz"

    def _info(self) -> dict[str, Any]:
        known = _all_info()
        name = self.argument_value
        if name not in known:
            flat = [other for other in known if not _is_3d(other)]
            raise UnknownName("dataset of MedMNIST", name, flat, cli_hint="`petune datasets medmnist` lists them")
        if _is_3d(name):
            raise ConfigError(f"medmnist:{name} has volumes (3D), and petune trains on images. Use one of the 2D sets")
        return known[name]

    def _find(self, data_dir: Path | None) -> Path | None:
        folders = [] if data_dir is None else [data_dir, data_dir / "medmnist"]
        files = [folder / self._file_name for folder in (*folders, cache_dir() / "data" / "medmnist")]
        return next((file for file in files if file.is_file()), None)

    def _download(self, info: dict[str, Any], data_dir: Path | None) -> Path:
        from torchvision.datasets.utils import download_url

        flag = "" if self.config.size == 28 else f"_{self.config.size}"
        url, folder = str(info[f"url{flag}"]), cache_dir() / "data" / "medmnist"
        searched = f"{data_dir} and {folder}" if data_dir else str(folder)
        if not reachable(url):
            raise DataError(
                f"medmnist:{self.argument_value} not found: {self._file_name} is not in {searched}, and {url} cannot "
                "be reached. Set data_dir or PETUNE_DATA to the directory that holds it",
                cli_hint="Name the directory with --data-dir",
            )
        try:
            with whole_file(folder / self._file_name) as file:
                download_url(url, str(file.parent), file.name, info[f"MD5{flag}"])
        except (RuntimeError, OSError) as error:
            raise DataError(f"downloading {url} to {folder} failed: {error}") from None
        return folder / self._file_name

    def _read(self, file: Path, part: str, target: Target) -> Split:
        key = {"medmnist": FORMAT, "file": file_key(file), "part": part, "kind": target.kind}
        return cached_split(key, partial(_decode, file, part, target, self.config.size))


def _all_info() -> dict[str, dict[str, Any]]:
    try:
        from medmnist.info import INFO
    except ImportError:
        raise MissingExtra("medmnist:NAME", "data") from None
    return INFO  # type: ignore[no-any-return]


def _is_3d(name: str) -> bool:
    return name.endswith("3d")


def _target(info: dict[str, Any]) -> Target:
    kind = "multi_hot" if "multi-label" in info["task"] else "class"
    names = (str(name) for _, name in sorted(info["label"].items(), key=lambda item: int(item[0])))
    return Target(kind, tuple(names))  # type: ignore[arg-type]


def _about(info: dict[str, Any]) -> str:
    count, labels = sum(info["n_samples"].values()), len(info["label"])
    return f"{count:,} images, {labels} {'labels' if 'multi-label' in info['task'] else 'classes'}; {info['license']}"


def _decode(
    file: Path, part: str, target: Target, side: int, allocate: Allocate
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    try:
        with np.load(file) as arrays:
            images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{file} is not a file of MedMNIST: {reason}. Download it again") from None
    columns = len(target.names) if target.kind == "multi_hot" else 1
    expected = ((len(images), side, side), (len(images), side, side, 3))
    if images.dtype != np.uint8 or images.shape not in expected or labels.shape != (len(images), columns):
        raise DataError(
            f"{file}: {part} has images of shape {images.shape} ({images.dtype}) and labels of shape {labels.shape}, "
            f"not {len(images)} images of {side}x{side} (uint8) with {columns} labels each. Download it again"
        )
    if labels.dtype.kind not in "iub":
        raise DataError(f"{file}: {part} has labels of type {labels.dtype}, not whole numbers. Download it again")
    out = allocate(len(images), side)
    for start in range(0, len(images), CHUNK):
        chunk = images[start : start + CHUNK]
        out[start : start + CHUNK] = chunk if chunk.ndim == 4 else chunk[..., None]  # gray as RGB
    targets = labels.astype(np.uint8) if target.kind == "multi_hot" else labels[:, 0].astype(np.int64)
    return targets, np.arange(len(images))
