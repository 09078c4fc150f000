"""The dataset `hf:NAME_OR_DIR`: datasets of the Hugging Face Hub, Parquet folders, and folders of `save_to_disk`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from petune.base.config import expand_home
from petune.base.errors import DataError, MissingExtra
from petune.base.hub import TIMEOUT_S, hub_url, why_unreachable
from petune.data.cache import cache_dir
from petune.data.dataset import Dataset, Target
from petune.data.manifest import Manifest, digest, file_digest
from petune.data.reader import DatasetReader, LabeledFiles, ReadContext
from petune.data.tables.assemble import load_plan
from petune.data.tables.columns import image_column, target_columns
from petune.data.tables.hf_table import HfTable, check_same_features, splits_by_name, store_streams, without_hidden
from petune.data.tables.joined import JoinedTable
from petune.data.tables.labeled import labeled_rows
from petune.data.tables.options import ColumnOptions, Name
from petune.data.tables.parquet import ParquetTable
from petune.data.tables.plan import Plan
from petune.data.tables.table import Table

LOGIN = "Accept its terms on its page, and log in with `hf auth login` or set HF_TOKEN"


@contextmanager
def _bars_on_terminals() -> Iterator[None]:
    """Show the progress bars of `datasets` on terminals only: in a file or a pipe each step would be a line."""
    import datasets

    if sys.stderr.isatty() or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


class HfConfig(ColumnOptions):
    """Options of a dataset of Hugging Face: its columns, configuration and revision.

    Attributes:
        config: Its configuration, if it has several.
        revision: A branch, tag or commit of its repository.
        streaming: Read it once from the network into petune's cache, without a copy in the cache of `datasets`.
    """

    text_options = ColumnOptions.text_options | {"config", "revision"}
    config: Name | None = None
    revision: Name | None = None
    streaming: bool = False


class HfReader(DatasetReader[HfConfig]):
    """A dataset that `datasets` can read."""

    about = "a dataset of the Hugging Face Hub, or a folder of Parquet files or of save_to_disk"
    needs = "petune[data], and a download if NAME is no folder"
    argument = "NAME"

    @property
    def path(self) -> Path | None:
        """The folder; None for a name on the Hub."""
        folder = expand_home(self.argument_value)
        return folder if folder.exists() or self.argument_value.startswith(("/", ".", "~")) else None

    def load(self, context: ReadContext) -> Dataset:
        """Read the dataset and decode its images once into the cache.

        Raises:
            DataError: It does not exist, needs a login, or cannot be downloaded; or its columns are wrong.
            MissingExtra: `datasets` is not installed.
        """
        splits = self._splits()
        plan, note = self._plan(splits)
        info = getattr(next(iter(splits.values())), "info", None)
        dataset = load_plan(plan, self._title, context).with_note(note)
        return replace(dataset, license=info.license or "", citation=info.citation or "") if info else dataset

    def target(self, context: ReadContext) -> Target:
        """Return kind and names of the targets."""
        return self._plan(self._splits())[0].target

    def find(self, data_dir: Path | None) -> str | None:
        """Return the folder, or the one in the cache of `datasets`."""
        if self.path is not None:
            return str(self.path) if self.path.is_dir() else None
        cached = self._cached_folder()
        return str(cached) if cached else None

    def manifest(self, data_dir: Path | None) -> Manifest:
        """Return the targets by split and class, with a digest of the files; empty if the folder does not exist."""
        if self.path is not None and not self.path.is_dir():
            return {}
        manifest = self._plan(self._splits())[0].manifest()
        version = self._files_digest()
        return {part: {name: f"{entry} {version}".strip() for name, entry in c.items()} for part, c in manifest.items()}

    def labeled_files(self, part: str) -> LabeledFiles | None:
        """Return the images of `test` or `val`, or all if there are no splits; None if the targets are masks.

        Raises:
            UsageError: There are splits, but not this one.
        """
        return labeled_rows(self._plan(self._splits())[0], part)

    @property
    def _title(self) -> str:
        return f"{self.name or 'hf'}:{self.argument_value}"

    def _plan(self, splits: dict[str, Table]) -> tuple[Plan, str]:
        """Return the plan of the splits, and a note about splits that are not used."""
        tables, unused = splits_by_name(splits, self._title)
        train = tables["train"]
        columns = target_columns(train, self.config, image_column(train, self.config))
        label = columns.columns[0] if columns.kind == "class" else None
        tables, hidden = without_hidden(tables, label)
        table: Table = JoinedTable(self._title, tables) if len(tables) > 1 else train
        return Plan.of(table, self.config), "; ".join(filter(None, (unused, hidden)))

    def _splits(self) -> dict[str, Table]:
        """Return all splits by their own names."""
        try:
            import datasets  # noqa: F401
        except ImportError:
            raise MissingExtra("a dataset named hf:…", "data") from None
        if self.path is not None:
            _check_folder(self.path)
        if self.config.streaming:
            key = [self.argument_value, self.config.config, self.config.revision, self._files_digest()]
            folder = cache_dir() / "streams" / digest(key)
            if not folder.is_dir():
                store_streams(self._read(), folder, self._title)
            return {file.stem: ParquetTable(file, folder) for file in sorted(folder.glob("*.parquet"))}
        return {name: HfTable(data, self._title) for name, data in self._read().items()}

    def _read(self) -> dict[str, Any]:
        """Return what `datasets` reads, by split."""
        import datasets

        if self.path is None and (self.config.streaming or self._cached_folder() is None):
            check_hub(self.argument_value, self.config.revision)
        try:
            if self.path is not None and (self.path / "dataset_dict.json").is_file():
                _check_saved_splits(self.path)
                return dict(datasets.load_from_disk(str(self.path)))
            if self.path is not None and (self.path / "state.json").is_file():
                return {"train": datasets.load_from_disk(str(self.path))}
            if self.path is not None:
                check_same_features(sorted(self.path.rglob("*.parquet")), self._title)
            name = str(self.path or self.argument_value)
            config, revision = self.config.config, self.config.revision
            with _bars_on_terminals():
                return dict(datasets.load_dataset(name, config, revision=revision, streaming=self.config.streaming))
        except DataError:
            raise
        except Exception as error:  # datasets, Arrow and the Hub raise dozens of types
            error = error if error.__cause__ is None else error.__cause__  # type: ignore[assignment]
            reason = " ".join(str(error).split())[:400] or type(error).__name__
            raise DataError(f"cannot read {self._title}: {reason}") from None

    def _files_digest(self) -> str:
        """Return a digest of the files of a folder; empty for a name on the Hub."""
        files = [] if self.path is None else sorted(path for path in self.path.rglob("*") if path.is_file())
        return digest([file_digest(file) for file in files]) if files else ""

    def _cached_folder(self) -> Path | None:
        """Return the folder of an earlier download."""
        from datasets.config import HF_DATASETS_CACHE
        from datasets.naming import camelcase_to_snakecase

        owner, _, name = self.argument_value.rpartition("/")
        folder = Path(HF_DATASETS_CACHE) / "___".join([*filter(None, [owner]), camelcase_to_snakecase(name)])
        return folder if folder.is_dir() else None


def check_hub(name: str, revision: str | None) -> None:
    """Check that the Hub has a dataset and lets it be downloaded, before `datasets` retries for a minute.

    Raises:
        DataError: There is no network, no such dataset or revision, or it needs a login.
    """
    problem = why_unreachable(hub_url(), is_hub=True)
    if problem is not None:
        raise DataError(
            f"hf:{name} is not in the cache of datasets and {problem}. Download it where there is a network, or give "
            "the path of a folder: hf:DIR"
        )
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    api = HfApi(endpoint=hub_url())
    try:
        info = api.dataset_info(name, revision=revision, timeout=TIMEOUT_S)
        if info.gated:
            api.auth_check(name, repo_type="dataset")
    except GatedRepoError:
        raise DataError(f"the dataset {name} needs a login. {LOGIN}") from None
    except RepositoryNotFoundError:
        raise DataError(
            f"the Hub has no dataset {name}, or it is private. Check the name; for a private one, log in with "
            "`hf auth login` or set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise DataError(f"the dataset {name} has no revision {revision!r}. Name a branch, tag or commit") from None
    except HFValidationError:
        raise DataError(f"no folder and no dataset of the Hub: {name!r}. Write hf:DIR or hf:OWNER/NAME") from None
    except (HfHubHTTPError, OSError) as error:
        raise DataError(f"{hub_url()} answered with {' '.join(str(error).split())[:300]}. Try again later") from None


def _check_saved_splits(path: Path) -> None:
    """Check that no split that `save_to_disk` wrote is empty: `datasets` writes it, and then cannot read it."""
    for split in json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]:
        state = json.loads((path / split / "state.json").read_text(encoding="utf-8"))
        if not state["_data_files"]:
            raise DataError(f"hf:{path}: the split {split} is empty. Save the dataset without it")


def _check_folder(path: Path) -> None:
    if not path.exists():
        raise DataError(f"no such folder: {path}")
    if not path.is_dir():
        raise DataError(f"{path} is a file. For a table write table:{path}")
    files = [file for file in path.rglob("*") if file.is_file() and not file.name.startswith(".")]
    suffixes = {file.suffix.lower() for file in files}
    if not suffixes & {".parquet", ".arrow"}:
        raise DataError(
            f"{path} has neither Parquet nor Arrow files. For a folder of images write folder:{path}; for a table of "
            "images, table:FILE"
        )
