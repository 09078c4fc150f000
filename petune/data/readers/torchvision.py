"""The datasets `torchvision:NAME`: every labeled image dataset of torchvision, read by torchvision's own code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from petune.base.errors import ConfigError, DataError, UnknownName
from petune.data.dataset import Dataset, Split, Target
from petune.data.on_request import on_request_note
from petune.data.reader import DatasetReader, ReadContext, ReaderConfig
from petune.data.samples import Samples, read_samples
from petune.data.torchvision_files import file_names, files_state, find_root, open_split, prepared_root, top_file
from petune.data.torchvision_table import NOT_LABELED, TABLE, Entry, Labels, Splits

T = TypeVar("T")


class TorchvisionConfig(ReaderConfig):
    """Options of a dataset of torchvision.

    Attributes:
        variant: One of its variants, such as EMNIST's `letters`, DTD's partition or the year of VOC.
        target: One of its kinds of targets, such as `segmentation` for OxfordIIITPet.
    """

    variant: str | int | None = None
    target: str | None = None


class TorchvisionReader(DatasetReader[TorchvisionConfig]):
    """A dataset of torchvision."""

    about = f"{len(TABLE)} labeled datasets of torchvision; `petune datasets torchvision` lists them"
    needs = "its files in data_dir, or a download"
    argument = "NAME"

    @classmethod
    def arguments(cls) -> dict[str, str]:
        """Return the names of the datasets, each with a line about it."""
        return {name: _about(entry) for name, entry in TABLE.items()}

    def load(self, context: ReadContext) -> Dataset:
        """Decode the images once into the cache; download the files if they are not here and torchvision can."""
        entry, splits, labels = self._entry(), self._splits(), self._labels()
        root = prepared_root(self.argument_value, entry, context.data_dir, splits)
        splits, note = self._variant_in(root)
        opened = {
            part: open_split(self.argument_value, root, {**args, **labels.args}, entry)
            for part, args in (("train", splits.train), ("val", splits.val), ("test", splits.test))
            if args is not None
        }
        target = _target(labels, opened["train"])
        read = {part: self._read(part, source, root, context) for part, source in opened.items()}
        empty = read["train"].take(np.arange(0))
        name = f"{self.name or 'torchvision'}:{self.argument_value}"
        source = self.find(context.data_dir) or str(root)
        val, test = read.get("val", empty), read.get("test", empty)
        dataset = Dataset(name, target, source, entry.augment, read["train"], val, test)
        return dataset.with_test().with_note(note).with_note(on_request_note(read))

    def target(self, context: ReadContext) -> Target:
        """Return kind and names, which some datasets have in their files; no image is decoded."""
        entry, splits, labels = self._entry(), self._splits(), self._labels()
        if isinstance(labels.names, tuple):
            return Target(labels.kind, labels.names)
        root = prepared_root(self.argument_value, entry, context.data_dir, splits)
        return _target(labels, open_split(self.argument_value, root, {**splits.train, **labels.args}, entry))

    def find(self, data_dir: Path | None) -> str | None:
        """Return the file or folder that torchvision reads."""
        entry = self._entry()
        root = find_root(self.argument_value, entry, data_dir)
        return str(top_file(root, entry) or root) if root else None

    def resizes(self, data_dir: Path | None) -> bool:
        """Return True if the images are photos, and not stored as they are."""
        return self._entry().side is None

    def _read(self, part: str, source: Any, root: Path, context: ReadContext) -> Split:
        entry, labels, has_test = self._entry(), self._labels(), self._splits().test is not None
        samples = Samples(
            name=f"torchvision:{self.argument_value}/{part}",
            source=source,
            kind=labels.kind,
            image=entry.upright,
            target=labels.value,
            side=entry.side,
            names=file_names(source),
        )
        options = self.config.model_dump(mode="json")
        key = {"torchvision": self.argument_value, "options": options, "part": part, "root": str(root.resolve())}
        return read_samples(samples, context, {**key, "files": files_state(root, entry)}, find_copies=not has_test)

    def _entry(self) -> Entry:
        name = self.argument_value
        if name in TABLE:
            return TABLE[name]
        if name in NOT_LABELED:
            raise ConfigError(
                f"torchvision:{name} cannot be trained on: {NOT_LABELED[name]}, and not one target for each image"
            )
        raise UnknownName("dataset of torchvision", name, TABLE, cli_hint="`petune datasets torchvision` lists them")

    def _splits(self) -> Splits:
        value = self.config.variant
        return _choose(self._entry().splits, None if value is None else str(value), "variant", self.argument_value)

    def _variant_in(self, root: Path) -> tuple[Splits, str]:
        """Return the variant that is read, and a note: without an option the first whose files are here.

        Raises:
            DataError: Its files are not here.
        """
        chosen = self._splits()
        if not chosen.folder:
            return chosen, ""
        choices = self._entry().splits
        here = [name for name, each in choices.items() if each.folder and (root / each.folder).is_dir()]
        wanted = next(name for name, each in choices.items() if each is chosen)
        if self.config.variant is None and here:
            wanted = here[0]
        if wanted in here:
            return choices[wanted], "" if self.config.variant else f"variant {wanted}"
        others = f"Here is {', '.join(here)}: write variant={here[0]}" if here else "Put it there"
        raise DataError(
            f"torchvision:{self.argument_value} has no files of variant {wanted}: there is no {root / chosen.folder}. "
            f"{others}"
        )

    def _labels(self) -> Labels:
        return _choose(self._entry().labels, self.config.target, "target", self.argument_value)


def _choose(choices: Mapping[str, T], value: str | None, option: str, name: str) -> T:
    """Return the choice of a name, the first if there is no name."""
    if value is None:
        return next(iter(choices.values()))
    named = [choice for choice in choices if choice]
    if value not in named:
        has = f"one of {', '.join(named)}" if named else "nothing, because there is only one"
        raise ConfigError(f"{option} of torchvision:{name} is {value!r}; it takes {has}")
    return choices[value]


def _target(labels: Labels, dataset: Any) -> Target:
    names = labels.names if isinstance(labels.names, tuple) else labels.names(dataset)
    return Target(labels.kind, tuple(map(str, names)))


def _about(entry: Entry) -> str:
    options = [
        f"{option}={'|'.join(choices)}"
        for option, choices in (("variant", entry.splits), ("target", entry.labels))
        if len(choices) > 1
    ]
    return "; ".join([entry.about, *options])
