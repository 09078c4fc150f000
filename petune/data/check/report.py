"""The report of `petune data check`: contents and problems of a dataset, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field

from petune.data.target import TargetKind


@dataclass(frozen=True)
class Balance:
    """Sizes of the classes of a split.

    Attributes:
        ratio: Images of the largest class by those of the smallest that has images.
        smallest, largest: Name and number of images.
    """

    ratio: float
    smallest: tuple[str, int]
    largest: tuple[str, int]


@dataclass(frozen=True)
class Sizes:
    """Sizes of the images in pixels, as (width, height).

    Attributes:
        smallest, median, largest: By area.
        input_size: Side at which the images would be used.
        num_smaller: Images of which a side is smaller than that, so that they are enlarged.
    """

    smallest: tuple[int, int]
    median: tuple[int, int]
    largest: tuple[int, int]
    input_size: int
    num_smaller: int


@dataclass(frozen=True)
class NearPair:
    """An image and its near-duplicate.

    Attributes:
        image, twin: Files, or split and position.
        similarity: Cosine of their hashes, at most 1.
        mirrored: One is the mirror image of the other.
        same_target: They have the same class, labels or numbers.
    """

    image: str
    twin: str
    similarity: float
    mirrored: bool
    same_target: bool


@dataclass(frozen=True)
class NearDuplicates:
    """Near-duplicates between two splits, or inside one.

    Attributes:
        split, other: The splits, the later one first; equal for pairs inside a split.
        num_pairs: Number of pairs.
        num_images: Images of `split` that have a near-duplicate in `other`.
        pairs: For the images with the most similar near-duplicates, the best first; at most `MAX_PAIRS`.
    """

    split: str
    other: str
    num_pairs: int
    num_images: int
    pairs: list[NearPair]


@dataclass
class DataReport:
    """Contents and problems of a dataset.

    Attributes:
        name: As given.
        kind: Kind of the targets.
        source: Where it was read from; empty for a folder.
        sample: `image` or `video`; videos are compared by four frames of a clip, and counted as images are.
        num_images: By split, images that cannot be decoded included.
        images: Number of images by split and class; for numbers by interval.
        balance: Of the training split; None unless the targets are classes or labels.
        sizes: Of all images.
        broken: A message for each image that cannot be decoded.
        mixed_channels: Two images with different channels or types, which cannot be trained on together, or the package
            that such channels need; empty if all is well.
        in_two_splits: Pairs of equal images in two splits, the earlier split second. They inflate the accuracy measured
            on the later split. Files are equal byte for byte, other images pixel for pixel.
        in_two_classes: Pairs of equal images of one split with different targets; one of them is wrong.
        near_duplicates: Images that are the same for people: recompressed, resized, brightened or mirrored.
        too_few_for_test, too_few_for_val: Classes with too few different images to give one to the split, if that
            split will be cut from train. Of folders.
        copies: Number of copies within one split and class; cutting never separates them.
        skipped: Number of visible files that are not read, by suffix.
        left_out: A note about what is not read; empty if there is nothing.
        doubtful_classes: A note about classes with the name of a split; empty if there are none.
    """

    name: str
    kind: TargetKind
    source: str = ""
    sample: str = "image"
    num_images: dict[str, int] = field(default_factory=dict)
    images: dict[str, dict[str, int]] = field(default_factory=dict)
    balance: Balance | None = None
    sizes: Sizes | None = None
    broken: list[str] = field(default_factory=list)
    mixed_channels: str = ""
    in_two_splits: list[tuple[str, str]] = field(default_factory=list)
    in_two_classes: list[tuple[str, str]] = field(default_factory=list)
    near_duplicates: list[NearDuplicates] = field(default_factory=list)
    too_few_for_test: list[str] = field(default_factory=list)
    too_few_for_val: list[str] = field(default_factory=list)
    copies: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    left_out: str = ""
    doubtful_classes: str = ""

    @property
    def is_sound(self) -> bool:
        """True if no image is broken, of other channels, in two splits or in two classes; near-duplicates are none."""
        return not self.broken and not self.mixed_channels and not self.in_two_splits and not self.in_two_classes
