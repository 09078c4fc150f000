"""The dataset `wds:SHARDS`: tar files of webdataset, read as a table with every sample exactly once."""

from __future__ import annotations

from pathlib import Path

from petune.base.config import expand_home
from petune.base.errors import DataError, MissingExtra
from petune.data.dataset import Dataset, Target
from petune.data.manifest import Manifest
from petune.data.reader import DatasetReader, LabeledFiles, ReadContext
from petune.data.tables.assemble import load_plan
from petune.data.tables.labeled import labeled_rows
from petune.data.tables.options import ColumnOptions
from petune.data.tables.plan import Plan
from petune.data.tables.table import listed
from petune.data.tables.wds_table import WdsTable

SUFFIXES = (".tar", ".tar.gz", ".tgz")


class WdsConfig(ColumnOptions):
    """Options of shards: columns are extensions, such as `jpg` and `cls`, and the keys of JSON files."""


class WdsReader(DatasetReader[WdsConfig]):
    """Shards of webdataset."""

    about = "tar shards of webdataset: a folder, or a pattern such as train-{000..012}.tar"
    needs = "petune[data]"
    argument = "SHARDS"

    @property
    def path(self) -> Path | None:
        """The folder or the file; None for a pattern."""
        return None if "{" in self.argument_value else expand_home(self.argument_value)

    def load(self, context: ReadContext) -> Dataset:
        """Decode the images once into the cache.

        Raises:
            DataError: A shard is missing, cut short or damaged, or its columns are wrong.
            MissingExtra: webdataset is not installed.
        """
        return load_plan(self._plan(), self._title, context)

    def target(self, context: ReadContext) -> Target:
        """Return kind and names of the targets."""
        return self._plan().target

    def find(self, data_dir: Path | None) -> str | None:
        """Return the folder of the shards, if they exist."""
        files = self._files()
        return str(files[0].parent) if files and all(file.is_file() for file in files) else None

    def manifest(self, data_dir: Path | None) -> Manifest:
        """Return the targets by split and class, with a digest of the shards; empty if they do not exist here."""
        return self._plan().manifest() if self.find(data_dir) else {}

    def labeled_files(self, part: str) -> LabeledFiles | None:
        """Return the images of `test` or `val`, or all if there are no splits; None if the targets are masks.

        Raises:
            UsageError: There are splits, but not this one.
        """
        return labeled_rows(self._plan(), part)

    @property
    def _title(self) -> str:
        return f"{self.name or 'wds'}:{self.argument_value}"

    def _plan(self) -> Plan:
        files = self._files()
        missing = [str(file) for file in files if not file.is_file()]
        if missing or not files:
            problem = f"no such shard: {listed(missing, 3)}" if missing else "no .tar files there"
            raise DataError(
                f"{self._title}: {problem}. Name a folder of .tar files, or a pattern: train-{{000..012}}.tar"
            )
        table = WdsTable(files, self._title)
        if self.config.image is None:
            table.check_keys()
        return Plan.of(table, self.config)

    def _files(self) -> list[Path]:
        try:
            from webdataset.shardlists import expand_urls
        except ImportError:
            raise MissingExtra("a dataset named wds:…", "data") from None
        if "://" in self.argument_value or self.argument_value.startswith("pipe:"):
            raise DataError(f"{self._title}: shards are read from files. Download them first")
        if self.path is not None and self.path.is_dir():
            return sorted(file for file in self.path.iterdir() if file.name.lower().endswith(SUFFIXES))
        return [expand_home(file) for file in expand_urls(self.argument_value)]
