"""Check a dataset before training: broken images, copies, leaks between splits, imbalance, sizes, near-duplicates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from petune.base.errors import DataError
from petune.data.check.near_duplicates import Hashes, find_twins
from petune.data.check.parts import Part, dataset_parts, folder_parts
from petune.data.check.report import Balance, DataReport, NearDuplicates, NearPair, Sizes
from petune.data.dataset import Dataset
from petune.data.load import read_dataset
from petune.data.reader import ReadContext
from petune.data.readers.folder import FolderReader
from petune.data.registry import build_reader, data_dir_or_default

MAX_PAIRS = 100
"""Near-duplicates that are named, for each pair of splits."""


def check_dataset(name: str, data_dir: Path | None = None, image_size: int = 224) -> DataReport:
    """Read every image of a dataset once and compare all of them.

    Takes about 15 seconds for 60,000 images of 32 pixels on one core.

    Args:
        name: As for `load_dataset`. A folder is read as it is, so that all broken images are listed and no split is
            cut; any other dataset is loaded.
        data_dir: Directory of downloaded datasets.
        image_size: Side, in pixels, at which the images will be used.

    Raises:
        DataError: The dataset is missing or inconsistent.
        UnknownName: There is no such dataset.
    """
    reader = build_reader(name)
    if isinstance(reader, FolderReader):
        report = DataReport(name, "class")
        parts = folder_parts(reader.path, report)
        broken: list[str] = []
    else:
        context = ReadContext(image_size, data_dir_or_default(data_dir))
        broken, dataset = _read(name, context)
        if dataset is None:
            return DataReport(name, reader.target(context).kind, broken=broken)
        is_video = dataset.train.num_frames is not None
        report = DataReport(name, dataset.target.kind, dataset.source, "video" if is_video else "image")
        parts = dataset_parts(dataset)
    report.num_images = {part: len(content.names) for part, content in parts.items()}
    report.images = {part: content.counts for part, content in parts.items()}
    report.broken = broken + [message for part in parts.values() for message in part.images.broken.values()]
    if report.kind in {"class", "multi_hot"}:
        report.balance = _balance(parts["train"].counts)
    report.sizes = _sizes(parts, image_size)
    distinct = _compare_exactly(parts, report)
    if isinstance(reader, FolderReader):
        _find_small_classes(parts, distinct, report)
    report.near_duplicates = _near_duplicates(parts, distinct)
    return report


def _read(name: str, context: ReadContext) -> tuple[list[str], Dataset | None]:
    """Return a message for each broken image, and the dataset without them; None if too little of it is left."""
    try:
        return [], read_dataset(name, context)  # as a run reads it, so that it is decoded into the cache once
    except DataError:
        pass
    skip = replace(context, on_broken="skip")
    try:
        return [], read_dataset(name, replace(skip, max_broken=0.0))
    except DataError as error:
        if not error.broken:
            raise
        broken = list(error.broken)
    try:
        return broken, read_dataset(name, replace(skip, max_broken=1.0))
    except DataError:  # such as a class without images
        return broken, None


def _balance(counts: Mapping[str, int]) -> Balance | None:
    filled = [(name, count) for name, count in counts.items() if count]
    if not filled:
        return None
    smallest = min(filled, key=lambda item: item[1])
    largest = max(filled, key=lambda item: item[1])
    return Balance(round(largest[1] / smallest[1], 2), smallest, largest)


def _sizes(parts: Mapping[str, Part], image_size: int) -> Sizes | None:
    sizes_N2 = np.concatenate([part.images.sizes_N2 for part in parts.values()])
    sizes_N2 = sizes_N2[sizes_N2[:, 0] > 0]
    if not len(sizes_N2):
        return None
    order = np.argsort(sizes_N2.prod(1), kind="stable")
    smallest, median, largest = (
        (int(width), int(height)) for width, height in sizes_N2[order[[0, len(order) // 2, -1]]]
    )
    return Sizes(smallest, median, largest, image_size, int((sizes_N2.min(1) < image_size).sum()))


@dataclass(frozen=True)
class _Seen:
    """The first image with certain bytes."""

    part: str
    position: int


def _compare_exactly(parts: Mapping[str, Part], report: DataReport) -> dict[str, list[int]]:
    """Record equal images in the report; return the positions of the distinct images of each split."""
    seen: dict[bytes, _Seen] = {}
    distinct: dict[str, list[int]] = {name: [] for name in parts}
    for name, part in parts.items():
        for i, digest in enumerate(part.images.digests):
            if i in part.images.broken:
                continue
            twin = seen.setdefault(digest, _Seen(name, i))
            other = parts[twin.part]
            if twin == _Seen(name, i):
                distinct[name].append(i)
            elif twin.part != name:
                report.in_two_splits.append((part.names[i], other.names[twin.position]))
            elif part.targets[i] != part.targets[twin.position]:
                report.in_two_classes.append((part.names[i], part.names[twin.position]))
            else:
                report.copies += 1
    return distinct


def _find_small_classes(parts: Mapping[str, Part], distinct: Mapping[str, list[int]], report: DataReport) -> None:
    different = Counter(parts["train"].targets[i] for i in distinct["train"])
    cuts_test = parts.keys() == {"train"}
    cuts_val = not {"val", "test"} <= parts.keys()
    if cuts_test:
        report.too_few_for_test = [name for name in parts["train"].counts if different[name] < 2]
    if cuts_val:
        report.too_few_for_val = [name for name in parts["train"].counts if different[name] < 2 + cuts_test]


def _near_duplicates(parts: Mapping[str, Part], distinct: Mapping[str, list[int]]) -> list[NearDuplicates]:
    """Compare the distinct images of every pair of splits; leaks between splits come first."""
    hashes = {name: Hashes.of(part.images.gray_NSS[distinct[name]]) for name, part in parts.items() if distinct[name]}
    names = list(hashes)
    between = [(later, earlier) for i, later in enumerate(names) for earlier in names[:i]]
    found = []
    for later, earlier in [*between, *((name, name) for name in names)]:
        twins = find_twins(hashes[later], None if later == earlier else hashes[earlier])
        if twins.num_pairs:
            num_images = int((twins.similarity_Q > 0).sum())
            best = torch.argsort(twins.similarity_Q, descending=True, stable=True)[: min(num_images, MAX_PAIRS)]
            pairs = []
            for query in best.tolist():
                i, j = distinct[later][query], distinct[earlier][int(twins.reference_Q[query])]
                similarity, mirrored = float(twins.similarity_Q[query]), bool(twins.mirrored_Q[query])
                pairs.append(_near_pair((parts[later], i), (parts[earlier], j), similarity, mirrored=mirrored))
            found.append(NearDuplicates(later, earlier, twins.num_pairs, num_images, pairs))
    return found


def _near_pair(image: tuple[Part, int], twin: tuple[Part, int], similarity: float, *, mirrored: bool) -> NearPair:
    (part, i), (other, j) = image, twin
    return NearPair(
        image=part.names[i],
        twin=other.names[j],
        similarity=round(min(similarity, 1.0), 4),
        mirrored=mirrored,
        same_target=part.targets[i] == other.targets[j],
    )
