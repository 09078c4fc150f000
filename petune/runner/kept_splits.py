"""Which image is in which split of a run, by its contents; a run that continues it keeps them there.

A folder that got new images is divided again by chance, which would put images that the earlier run trained on into
val and test. Images are recognized by the bytes of their files, or by their pixels where a table holds them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from petune.base.errors import CheckpointError, ConfigError, DataError
from petune.base.text import plural
from petune.data.dataset import Dataset, Split
from petune.data.find_images import size_and_time
from petune.data.folds import pooled
from petune.data.lookup import check_training_images, is_training_dataset, manifest_of
from petune.data.manifest import changes, digests, file_digest
from petune.data.registry import parse_dataset
from petune.runner.file_names import MANIFEST_FILE, SPLITS_FILE
from petune.runner.migrations import read_record
from petune.runner.run_adapter import read_run_adapter, run_dir_of
from petune.runner.run_config import RunConfig
from petune.runner.run_dir import write_record

PARTS = ("train", "val", "test")
CHUNK = 256
WAYS = "Put the images back, or start without from_run on all images that there are now"


@dataclass(frozen=True)
class SplitRecord:
    """The images of a run by their digests; saved as `splits.json`.

    Attributes:
        train, val, test: Of each split.
        trained_before: What the runs that it continues trained on, besides its own training images; None if that is not
            known.
        kept: The splits are those of an earlier run, which no option says.
        by_files: Digests are those of files, not of pixels.
    """

    train: frozenset[str]
    val: frozenset[str]
    test: frozenset[str]
    trained_before: frozenset[str] | None
    kept: bool
    by_files: bool

    @property
    def images(self) -> frozenset[str]:
        """The images of the run."""
        return self.train | self.val | self.test

    @property
    def trained_on(self) -> frozenset[str]:
        """Images that the model has been trained on, by this run and those before it."""
        return self.train | (self.trained_before or frozenset())

    def part_of(self, digest: str) -> str | None:
        """Return the split that an image must stay in; None if it may be in any."""
        if digest in self.trained_on:
            return "train"
        return "val" if digest in self.val else "test" if digest in self.test else None


def read_splits(run_dir: Path | None) -> SplitRecord | None:
    """Return the record of a run; None if it has none: an older version wrote it, or its images never change.

    Raises:
        CheckpointError: It is damaged.
    """
    values = {} if run_dir is None else read_record(run_dir / SPLITS_FILE)
    if not values:
        return None
    try:
        before = None if values["trained_before"] is None else frozenset(map(str, values["trained_before"]))
        train, val, test = (frozenset(map(str, values[part])) for part in PARTS)
        return SplitRecord(train, val, test, before, bool(values["kept"]), bool(values["by_files"]))
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{run_dir}/{SPLITS_FILE} is damaged: {error!r}") from None


def record_splits(run_dir: Path, config: RunConfig, dataset: Dataset) -> None:
    """Write `splits.json` when a run starts, if the images of its dataset may change."""
    if (run_dir / SPLITS_FILE).exists() or not manifest_of(config.dataset, config.data_dir):
        return
    sets = {part: sorted({*image_digests(getattr(dataset, part))}) for part in PARTS}
    before = _record_of_start(config)
    is_known = config.from_run is None or (before is not None and before.trained_before is not None)
    trained_before = sorted((before.trained_on if before else frozenset()) - {*sets["train"]}) if is_known else None
    kinds = {"kept": dataset.kept_splits, "by_files": _has_files(dataset.train)}
    record = {**sets, "trained_before": trained_before, **kinds}
    write_record(run_dir / SPLITS_FILE, record)


def keep_splits(config: RunConfig, dataset: Dataset, run_dir: Path | None, *, val_is_cut: bool) -> Dataset:
    """Return the dataset with every image that an earlier run had in the split that it had there.

    Args:
        config: The run, which may continue another one.
        dataset: Divided without regard to that.
        run_dir: Its directory, whose own record counts if it has started; None if it has none.
        val_is_cut: The val split is one that petune cut.

    Raises:
        DataError: The images changed and the earlier run has no record, or an image that it trained on is in a split
            that the dataset itself has.
        ConfigError: The images changed, and folds divide all of them again.
    """
    if config.from_run is None or not manifest_of(config.dataset, config.data_dir):
        return dataset
    own = read_splits(run_dir)
    record = own or _record_of_start(config)
    if record is None:
        _check_unchanged(config)
        return dataset
    digest_by_part = _images_to_divide(config, dataset, record, has_started=own is not None)
    if digest_by_part is None:
        return dataset
    if config.folds is not None:
        raise ConfigError(
            f"{config.dataset} has other images than {config.from_run}, and folds divide all again. {WAYS}"
        )
    movable = ("train", *(["val"] if val_is_cut else []), *(["test"] if dataset.cut_test else []))
    _check_fixed(config, record, {part: digest_by_part[part] for part in PARTS if part not in movable})
    return _divided(config, dataset, record, {part: digest_by_part[part] for part in movable})


def _images_to_divide(
    config: RunConfig, dataset: Dataset, record: SplitRecord, *, has_started: bool
) -> dict[str, list[str]] | None:
    """Return the digests of the images of each split; None if each image is in the split that the record has it in.

    Raises:
        DataError: Most images of the record are missing.
    """
    is_same_place = not has_started and _is_same_place(config)
    if not record.kept and (has_started or (is_same_place and not _changed(config))):
        return None
    digest_by_part = {part: [*image_digests(getattr(dataset, part))] for part in PARTS}
    images = {digest for every in digest_by_part.values() for digest in every}
    if is_same_place and not record.kept and images == record.images:
        return None  # divided by other options: `check_unseen` compares
    found = record.images & images
    if is_same_place and len(found) < len(record.images) / 2:
        raise DataError(
            f"{config.dataset} has only {len(found)} of the {plural(len(record.images), 'image')} of "
            f"{config.from_run}, so nobody can tell whether the others are the same in other files. {WAYS}"
        )
    return digest_by_part if images & (record.images | record.trained_on) else None


def _record_of_start(config: RunConfig) -> SplitRecord | None:
    """Return the record of the run that one continues; what it trained on in the end, on train and val, is train."""
    record = None if config.from_run is None else read_splits(_directory(config.from_run))
    if record is None or "final_fit" not in _metadata(config).get("training", {}):
        return record
    return replace(record, train=record.train | record.val, val=frozenset())


def _divided(config: RunConfig, dataset: Dataset, record: SplitRecord, movable: Mapping[str, list[str]]) -> Dataset:
    """Return the dataset with the images of the movable splits where the record has them; new ones stay."""
    pool = pooled([getattr(dataset, part) for part in movable])
    digest_N = [digest for every in movable.values() for digest in every]
    now_N = [part for part, every in movable.items() for _ in every]
    wanted_N = [part if (part := record.part_of(digest)) in movable else None for digest in digest_N]
    parts_of_unit: dict[int, set[str]] = {}
    unit_N = pool.samples(dataset.target.kind).units().tolist()
    for unit, wanted in zip(unit_N, wanted_N, strict=True):
        parts_of_unit.setdefault(unit, set()).update([wanted] if wanted else ())
    # copies and groups stay together: where one was trained on, so were, as far as a test is concerned, the others
    first = {unit: next((part for part in PARTS if part in parts), None) for unit, parts in parts_of_unit.items()}
    part_N = np.array([first[unit] or now for unit, now in zip(unit_N, now_N, strict=True)])
    order = np.argsort(pool.rows, kind="stable")
    splits: dict[str, Any] = {}
    for part in movable:
        split = getattr(dataset, part)
        splits[part] = replace(pool.take(order[part_N[order] == part]), images=split.images, crop=split.crop)
        if not len(splits[part]):
            raise DataError(
                f"none of the {part} images of {config.from_run} is left in {config.dataset}, and no new one is in "
                f"{part}. {WAYS}"
            )
    num_new = sum(digest not in record.images | record.trained_on for digest in digest_N)
    sizes = ", ".join(f"{part} {len(split):,}" for part, split in splits.items())
    note = f"every image of {config.from_run} stays in its split; {plural(num_new, 'new image')} divided ({sizes})"
    return replace(dataset, **splits, kept_splits=True).with_note(note)


def _check_fixed(config: RunConfig, record: SplitRecord, fixed: Mapping[str, list[str]]) -> None:
    """Check that splits that the dataset itself has hold no image that was trained on."""
    for part, every in fixed.items():
        seen = sum(digest in record.trained_on for digest in every)
        if seen:
            raise DataError(
                f"{config.from_run} trained on {seen} of {plural(len(every), 'image')} of {part} of {config.dataset}. "
                f"Move them into train, or start without from_run",
                cli_hint="Drop --from",
            )


def _check_unchanged(config: RunConfig) -> None:
    """Check that the images of a run without a record are the same, or only training images were added.

    Raises:
        DataError: They changed.
    """
    metadata = _metadata(config)
    trained_digests = metadata.get("images") or {}
    if not is_training_dataset(config.dataset, str(metadata.get("dataset")), trained_digests):
        return
    now = digests(manifest_of(config.dataset, config.data_dir))
    own_splits = {"val", "test"} <= now.keys()
    if own_splits and all(now[part] == trained_digests.get(part) for part in ("val", "test")):
        return
    try:
        check_training_images(config.dataset, trained_digests, config.data_dir)
    except DataError:
        raise DataError(
            f"the images of {config.dataset} changed since {config.from_run}, which has no {SPLITS_FILE} that says "
            f"which of them it trained on. {WAYS}"
        ) from None


def _changed(config: RunConfig) -> bool:
    assert config.from_run is not None
    directory = _directory(config.from_run)
    before = {} if directory is None else read_record(directory / MANIFEST_FILE)
    return bool(changes(before, manifest_of(config.dataset, config.data_dir)))


def _is_same_place(config: RunConfig) -> bool:
    metadata = _metadata(config)
    before = str(metadata.get("dataset"))
    now, then = parse_dataset(config.dataset), parse_dataset(before)
    is_same = (now.name, now.argument) == (then.name, then.argument)  # perhaps with options that divide it otherwise
    return is_same or is_training_dataset(config.dataset, before, metadata.get("images") or {})


def _metadata(config: RunConfig) -> dict[str, Any]:
    assert config.from_run is not None
    metadata: dict[str, Any] = read_run_adapter(config.from_run).config["metadata"]
    return metadata


def _directory(from_run: Path) -> Path | None:
    """Return the directory of a run that is named by itself or by its adapter."""
    saved = read_run_adapter(from_run)
    return run_dir_of(saved.path, saved.config["metadata"])


def image_digests(split: Split) -> Iterator[str]:
    """Yield a digest of each image: of its file, or of its pixels where it has none of its own."""
    if split.names is not None and _has_files(split):
        yield from file_digests(split.names.tolist())
        return
    for start in range(0, len(split), CHUNK):
        for pixels in split.images_at(slice(start, start + CHUNK)):
            yield blake2b(pixels.tobytes(), digest_size=8).hexdigest()


def file_digests(names: Sequence[str]) -> Iterator[str]:
    """Yield a digest of each file."""
    with ThreadPoolExecutor() as threads:
        yield from threads.map(_file_digest, names)


def _has_files(split: Split) -> bool:
    return split.names is not None and len(split) > 0 and Path(split.names[0]).is_file()


def _file_digest(name: str) -> str:
    return _digest_of_state(name, *size_and_time(Path(name)))


@lru_cache(maxsize=100_000)  # the runs of a comparison read one folder
def _digest_of_state(name: str, size: int, time: int) -> str:
    return file_digest(Path(name))
