"""Recognize the split that a folder name means: `train`, `Hold-out`, `seg_train`, `TestData`, `imagesTr`."""

from __future__ import annotations

import re
from dataclasses import dataclass

SPLIT_NAMES = {
    "train": ("train", "training", "trainval"),
    "val": ("val", "valid", "validation", "dev", "development"),
    "test": ("test", "testing", "eval", "evaluation", "holdout", "heldout"),
}
"""Split to the names of its folder, without case and separators; the names are those of Hugging Face datasets."""
SHORT_NAMES = {"tr": "train", "trn": "train", "ts": "test", "te": "test", "tst": "test"}
"""Names that mean a split only next to another split, as in `imagesTr` and `imagesTs`."""
FILLERS = (
    *("dataset", "data", "set", "split", "folder", "samples"),
    *("images", "image", "imgs", "img", "photos", "pics"),
)
"""Words that say nothing about what is in a split."""


@dataclass(frozen=True)
class SplitName:
    """A folder name that contains the word for a split.

    Attributes:
        split: `train`, `val` or `test`.
        rest: The other words, without fillers: `seg` for `seg_train_images`; `*s` for `trains`.
        is_word: The split is a word of the name, not a part of one.
    """

    split: str
    rest: str
    is_word: bool = True

    @property
    def is_numbered(self) -> bool:
        """True if only numbers are added, as in `train2017` and `test1`, or nothing at all."""
        return not self.rest.strip("0123456789 ")


def split_of(folder_name: str) -> str | None:
    """Return the split that a folder name means (`Hold-out` is test, `train_set` is train), or None."""
    plain = re.sub(r"[-_ .]", "", folder_name.casefold())
    names = {plain, plain.removesuffix("set")}
    return next((split for split, known in SPLIT_NAMES.items() if names.intersection(known)), None)


def parse_split_name(folder_name: str) -> SplitName | None:
    """Return the split in a folder name and the rest of the name, or None if no word of it starts or ends with one."""
    split = split_of(folder_name)
    if split is not None:
        return SplitName(split, "")
    separated = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", folder_name)
    words = [word.casefold() for word in re.findall(r"[^\W\d_]+|\d+", separated)]
    splits = {i: split for i, word in enumerate(words) if (split := _split_of_word(word))}
    if len(splits) == 1:
        ((position, split),) = splits.items()
        others = [word for i, word in enumerate(words) if i != position and word not in FILLERS]
        return SplitName(split, " ".join(others))
    return None if splits else _part_of_word("".join(words))


def _split_of_word(word: str) -> str | None:
    """Return the split of `train`, `traindata` or `tr`."""
    names = {word}
    for filler in FILLERS:
        names |= {word.removesuffix(filler), word.removeprefix(filler)}
    known = next((split for split, known in SPLIT_NAMES.items() if names.intersection(known)), None)
    return known or next((split for name, split in SHORT_NAMES.items() if name in names), None)


def _part_of_word(plain: str) -> SplitName | None:
    """Return the split that a name without separators starts or ends with: `segtrain`, but also `testudo`."""
    known = [(name, split) for split, names in SPLIT_NAMES.items() for name in names]
    for name, split in sorted(known, key=lambda entry: -len(entry[0])):
        if plain.startswith(name):
            return SplitName(split, f"*{plain.removeprefix(name)}", is_word=False)
        if plain.endswith(name):
            return SplitName(split, f"{plain.removesuffix(name)}*", is_word=False)
    return None
