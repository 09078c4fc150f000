"""The dataset `table:FILE`: a CSV, TSV, Parquet or JSON lines file with a row for each image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pydantic import Field

from petune.base.config import UserPath, expand_home
from petune.base.errors import DataError
from petune.data.dataset import Dataset, Target
from petune.data.manifest import Manifest
from petune.data.reader import DatasetReader, LabeledFiles, ReadContext
from petune.data.tables.assemble import load_plan
from petune.data.tables.columns import image_column
from petune.data.tables.contents import ImageColumn
from petune.data.tables.labeled import labeled_rows
from petune.data.tables.options import ColumnOptions
from petune.data.tables.parquet import ParquetTable
from petune.data.tables.plan import Plan
from petune.data.tables.table import Table
from petune.data.tables.text import read_delimited, read_json_lines
from petune.data.tables.videos import has_videos
from petune.data.video.options import ClipOptions

FORMATS: dict[str, Callable[[Path, Path], Table]] = {
    ".csv": read_delimited,
    ".tsv": read_delimited,
    ".jsonl": read_json_lines,
    ".parquet": ParquetTable,
}


class TableConfig(ColumnOptions, ClipOptions):
    """Options of a table: its columns, the folder of the images, and the clips of videos.

    Attributes:
        images: Folder that paths of images and masks are relative to; by default that of the table.
    """

    images: UserPath | None = Field(default=None)


class TableReader(DatasetReader[TableConfig]):
    """A table with a row for each image."""

    about = "a CSV, TSV, Parquet or JSON lines file: images or videos, and classes, labels, numbers or masks"
    argument = "FILE"

    @property
    def path(self) -> Path:
        """The file, with `~` expanded."""
        return expand_home(self.argument_value)

    def load(self, context: ReadContext) -> Dataset:
        """Decode the images once into the cache; see `petune.data.tables`."""
        return load_plan(self._plan(), f"{self.name or 'table'}:{self.argument_value}", context)

    def target(self, context: ReadContext) -> Target:
        """Return kind and names of the targets; only masks without named classes are decoded for it.

        Raises:
            DataError: The file does not exist or cannot be read, or its columns are wrong.
        """
        return self._plan().target

    def num_frames(self, context: ReadContext) -> int | None:
        """Return the frames of a clip, if the table lists videos."""
        return self.config.sampling_of(context).frames if has_videos(self._plan()) else None

    def find(self, data_dir: Path | None) -> str | None:
        """Return the file, if it exists."""
        return str(self.path) if self.path.is_file() else None

    def manifest(self, data_dir: Path | None) -> Manifest:
        """Return targets, names and sizes of the images by split and class; empty if the file does not exist here.

        Raises:
            DataError: As for `target`, or an image is missing.
        """
        return self._plan().manifest() if self.path.is_file() else {}

    def labeled_files(self, part: str) -> LabeledFiles | None:
        """Return the images of `test` or `val`, or all if the table has no splits; None if the targets are masks.

        Raises:
            UsageError: The table has splits, but not this one.
        """
        return labeled_rows(self._plan(), part)

    def image_files(self) -> list[Path] | None:
        """Return the images that the table lists; it needs no targets."""
        table = self._table()
        return ImageColumn(table, image_column(table, self.config)).files

    def _plan(self) -> Plan:
        return Plan.of(self._table(), self.config)

    def _table(self) -> Table:
        if not self.path.exists():
            raise DataError(f"no such file: {self.path}")
        read = FORMATS.get(self.path.suffix.lower())
        if read is None or self.path.is_dir():
            raise DataError(f"{self.path} is no table. table:FILE takes {', '.join(FORMATS)}")
        folder = self.config.images or self.path.parent
        if not folder.is_dir():
            raise DataError(f"no such folder of images: {folder}")
        return read(self.path, folder)
