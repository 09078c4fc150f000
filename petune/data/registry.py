"""Datasets by name: `NAME[:ARGUMENT][,key=value...]`, such as `cifar10`, `folder:pets` or `table:pets.csv,label=breed`.

They register through the entry-point group `petune.datasets`, the built-in ones too. A plugin cannot take the name of
a dataset that comes with petune.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator

from petune.base.config import expand_home
from petune.base.entry_points import OWN, PluginKind, RegisteredPlugin, registered_plugins, state_of
from petune.base.errors import ConfigError, DataError, PluginError, UnknownName
from petune.base.plugins import load_plugin, plugin_errors
from petune.base.yaml_values import parse_options, split_items
from petune.data.reader import DatasetReader, ReaderConfig

DATASETS = PluginKind(
    group="petune.datasets",
    noun="dataset",
    hint="`petune datasets` lists the installed ones; a folder of images is folder:PATH",
)
LONGEST_PATH = 1000
"""Longer paths are shortened in messages."""
TABLE_SUFFIXES = frozenset([".csv", ".jsonl", ".parquet", ".tsv"])


@dataclass(frozen=True)
class DatasetRecord:
    """A registered dataset.

    Attributes:
        name: The dataset's name, the left side of the entry point.
        argument: The word for its argument, `PATH` in `folder:PATH`; empty if it takes none.
        about: What the dataset is, in one line.
        needs: What it needs, such as an extra or a download.
        distribution, version: The package that brings it.
        state: `ok`, or why the name cannot be used.
    """

    name: str
    argument: str
    about: str
    needs: str
    distribution: str
    version: str
    state: str

    @property
    def is_own(self) -> bool:
        """True for a dataset that comes with petune."""
        return self.distribution == OWN

    @property
    def usage(self) -> str:
        """The name with its argument: `folder:PATH`."""
        return f"{self.name}:{self.argument}" if self.argument else self.name


@dataclass(frozen=True)
class DatasetName:
    """A dataset as it is written on the command line.

    Attributes:
        name: Left of the colon.
        argument: Right of it; empty if there is no colon.
        option_text: The options after it.
    """

    name: str
    argument: str
    option_text: str = ""


def list_datasets() -> list[DatasetRecord]:
    """List every registered dataset, petune's own first. Imports them, since they describe themselves."""
    registered = registered_plugins(DATASETS)
    return [_record(plugin, state_of(plugin, registered)) for plugin in registered]


def list_arguments(name: str) -> dict[str, str]:
    """Return the arguments that a dataset takes, each with a line about it; empty if they cannot be listed.

    Raises:
        UnknownName: There is no such dataset.
        PluginError: The package that brings it cannot be loaded.
    """
    cls = load_plugin(DATASETS, name, DatasetReader, ReaderConfig)
    with plugin_errors(DATASETS, name, cls, "listed its arguments"):
        return cls.arguments()


def build_reader(text: str) -> DatasetReader[Any]:
    """Build the reader of a dataset.

    Args:
        text: `NAME[:ARGUMENT][,key=value...]`, or the path of a folder or table.

    Raises:
        UnknownName: There is no such dataset.
        DataError: The text is a path, but nothing that can be read is there.
        ConfigError: The argument is missing, or an option is unknown or wrong.
        PluginError: Two packages claim the name, or the package cannot be loaded.
    """
    parsed = parse_dataset(text)
    try:
        cls = load_plugin(DATASETS, parsed.name, DatasetReader, ReaderConfig)
    except UnknownName:
        is_path = os.sep in parsed.name or Path(parsed.name).suffix.lower() in TABLE_SUFFIXES
        if not parsed.argument and (is_path or (parsed.name and _exists(parsed.name))):
            raise DataError(_unreadable_path(parsed.name)) from None
        raise
    if _is_too_long(parsed.argument):
        raise DataError(
            f"{parsed.name}:{parsed.argument[:40]}… cannot be a path: it has {len(parsed.argument):,} letters"
        )
    if bool(cls.argument) != bool(parsed.argument):
        is_option = not cls.argument and "=" in parsed.argument
        usage = f"{parsed.name}:{cls.argument}" if cls.argument else parsed.name
        usage += f",{parsed.argument} (options follow a comma)" if is_option else ""
        problem = f"needs a {cls.argument}" if cls.argument else f"takes nothing after a colon, but got {text!r}"
        raise ConfigError(f"the dataset {parsed.name} {problem}. Write {usage}")
    options = parse_options(parsed.option_text, cls.Config.text_options)
    config = cls.Config.build(options, f"the options of {parsed.name}")
    with plugin_errors(DATASETS, parsed.name, cls, "was made"):
        reader = cls(parsed.argument, config)
    reader.name = parsed.name
    return reader


def parse_dataset(text: str) -> DatasetName:
    """Split a dataset into name, argument and options; a plain path gets the name `folder` or `table`.

    Only trailing `,key=value` pieces are options, unless a path with that very text exists.
    """
    body, option_text = _split_options(text)
    kind = _kind_of_path(body)
    if kind:
        return DatasetName(kind, body, option_text)
    name, _, argument = body.partition(":")
    return DatasetName(name, argument, option_text)


def complete_name(text: str) -> str:
    """Return `folder:PATH` or `table:FILE` for a plain path, other text unchanged."""
    body, _ = _split_options(text)
    kind = _kind_of_path(body)
    return f"{kind}:{text}" if kind else text


DatasetText = Annotated[str, AfterValidator(complete_name)]
"""The type of a dataset in a configuration: a plain path is stored as `folder:PATH` or `table:FILE`."""


def is_table(text: str) -> bool:
    """Return True for the path of a table, or `table:FILE`."""
    return parse_dataset(text).name == "table"


def _split_options(text: str) -> tuple[str, str]:
    argument = text.partition(":")[2]
    if _exists(text) or (argument and _exists(argument)):
        return text, ""
    body, *rest = split_items(text)
    while rest and not all(_is_option(item) for item in rest):
        body = f"{body},{rest.pop(0)}"
    return body, ",".join(rest)


def _is_option(item: str) -> bool:
    key, equals, _ = item.partition("=")
    return bool(equals) and key.strip().isidentifier()


def _kind_of_path(text: str) -> str:
    """Return `folder` or `table` for an existing path that is not the name of a dataset, else an empty string."""
    path = expand_home(text)
    is_table = path.suffix.lower() in TABLE_SUFFIXES and _exists(text)
    if not (is_table or (text and _exists(text) and path.is_dir())):
        return ""
    if any(plugin.name == text for plugin in registered_plugins(DATASETS)):
        return ""
    return "table" if is_table and path.is_file() else "folder"


def _exists(text: str) -> bool:
    try:
        return expand_home(text).exists()
    except (OSError, ValueError):  # too long, or with a null character
        return False


def _is_too_long(text: str) -> bool:
    try:
        expand_home(text.partition("{")[0]).exists()
    except OSError as error:
        return error.errno == errno.ENAMETOOLONG
    except ValueError:  # a null character
        return False
    return False


def _unreadable_path(text: str) -> str:
    text = text if len(text) <= LONGEST_PATH else f"{text[:40]}… ({len(text):,} letters)"
    if not _exists(text):
        return f"no such file or folder: {text}"
    return f"{text} is neither a folder nor a table ({', '.join(sorted(TABLE_SUFFIXES))})"


def _record(plugin: RegisteredPlugin, state: str) -> DatasetRecord:
    argument, about, needs = "", plugin.summary, ""
    if state == "ok":
        try:
            cls = load_plugin(DATASETS, plugin.name, DatasetReader, ReaderConfig)
        except PluginError as error:
            state = str(error)
        else:
            argument, about, needs = cls.argument, cls.about or about, cls.needs
    return DatasetRecord(plugin.name, argument, about, needs, plugin.distribution, plugin.version, state)


def data_dir_or_default(data_dir: Path | None) -> Path | None:
    """Return the directory of datasets: `data_dir`, else the one named by `PETUNE_DATA`, else None."""
    value = os.environ.get("PETUNE_DATA")
    return data_dir or (expand_home(Path(value)) if value else None)
