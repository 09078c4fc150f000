"""The datasets `cifar10` and `cifar100`."""

from __future__ import annotations

from pathlib import Path

from petune.data.cache import cache_dir
from petune.data.cifar import load_cifar, published_files
from petune.data.cifar_parquet import parquet_files
from petune.data.dataset import Dataset, Target
from petune.data.reader import DatasetReader, ReadContext, ReaderConfig


class Cifar10Reader(DatasetReader[ReaderConfig]):
    """CIFAR-10 (Krizhevsky, 2009)."""

    about = "60,000 images of 10 classes, 32x32"
    needs = "a download of 163 MB, or its files in data_dir"

    def load(self, context: ReadContext) -> Dataset:
        """Read the published archive or Parquet files, downloaded if they are not here."""
        return load_cifar("cifar10", context.data_dir)

    def target(self, context: ReadContext) -> Target:
        """Return ten classes; their names need the files."""
        return _numbered(10)

    def find(self, data_dir: Path | None) -> str | None:
        """Return the archive, folder or Parquet files."""
        return _find("cifar10", data_dir)


class Cifar100Reader(DatasetReader[ReaderConfig]):
    """CIFAR-100 (Krizhevsky, 2009) with its fine labels."""

    about = "60,000 images of 100 classes, 32x32"
    needs = "a download of 161 MB, or its files in data_dir"

    def load(self, context: ReadContext) -> Dataset:
        """Read the published archive or Parquet files, downloaded if they are not here."""
        return load_cifar("cifar100", context.data_dir)

    def target(self, context: ReadContext) -> Target:
        """Return a hundred classes; their names need the files."""
        return _numbered(100)

    def find(self, data_dir: Path | None) -> str | None:
        """Return the archive, folder or Parquet files."""
        return _find("cifar100", data_dir)


def _numbered(count: int) -> Target:
    return Target("class", tuple(map(str, range(count))))


def _find(name: str, data_dir: Path | None) -> str | None:
    for root in (data_dir, cache_dir() / "data"):
        if root is None:
            continue
        published = published_files(name, root)
        if published:
            return str(published[0])
        parquet = parquet_files(name, root)
        if parquet is not None:
            return str(parquet["train"][0].parent)
    return None
