"""One HTML page with images of a dataset as a model sees them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from petune.base.errors import UsageError
from petune.base.files import replace_file
from petune.base.text import plural
from petune.data import Dataset, Preprocess, Split
from petune.data.policy import check_augment
from petune.data.steps import StepConfig, check_split
from petune.runner.report.render import check_output, render
from petune.runner.report.seen_images import Augmentations, augmented_gallery
from petune.runner.report.tiles import mask_key

GENERATOR = "petune data show"


@dataclass(frozen=True)
class Sample:
    """Images of a dataset to show.

    Attributes:
        split: `train`, `val` or `test`.
        image_size: Side of the model's input, in pixels.
        augment: The name of an augmentation, or a list as in a run's `train.augment`; `auto` takes the dataset's own,
            `none` shows the images only.
        num_images: Number of images.
        times: Number of augmentations of each image.
        seed: Selects images and augmentations.
    """

    split: str = "train"
    image_size: int = 224
    augment: str | list[StepConfig] = "auto"
    num_images: int = 24
    times: int = 3
    seed: int = 0


def write_data_page(dataset: Dataset, output: Path, sample: Sample) -> dict[str, Any]:
    """Write a page of random images, each as it is and after several augmentations; an older page is replaced.

    Args:
        dataset: Its images.
        output: The HTML file.
        sample: Which images, and how they are augmented.

    Returns:
        The file, the number of images and the augmentation, as JSON data.

    Raises:
        UsageError: The split is empty, or `output` is some other file.
        ConfigError: There is no such augmentation, or it does not go with the images.
    """
    check_output(output, GENERATOR)
    split: Split = getattr(dataset, sample.split)
    if not len(split):
        raise UsageError(f"{dataset.name} has no {sample.split} split before a run cuts one. Show another split")
    augmentations = Augmentations(
        dataset.augment if sample.augment == "auto" else sample.augment, sample.times, sample.seed
    )
    channels = split.images.shape[-1]
    check_split(augmentations.steps, split)
    check_augment(augmentations.steps, side=sample.image_size, channels=channels)
    half = (0.5,) * channels  # undone again: any values do
    preprocess = Preprocess(sample.image_size, half, half, split.num_frames)
    generator = np.random.default_rng(sample.seed)
    positions = np.sort(generator.choice(len(split), min(sample.num_images, len(split)), replace=False))
    gallery = augmented_gallery(split, dataset.target, preprocess, positions, augmentations)
    about = (
        f"{len(positions):,} of {plural(len(split), 'image')} from {dataset.source}, at "
        f"{sample.image_size}x{sample.image_size} pixels, as a model sees them. Augmentation: {augmentations}."
    )
    if channels not in {1, 3}:
        about += f" Of {channels} channels, the first {min(channels, 3)} are shown as red, green and blue."
    if split.num_frames is not None:
        about += f" Of each clip of {plural(split.num_frames, 'frame')}, four are shown in reading order."
    page = render(
        "gallery.html.jinja",
        GENERATOR,
        title=f"{dataset.name}, {sample.split}",
        about=[about],
        key=mask_key(dataset.target.names) if dataset.target.kind == "mask" else [],
        galleries=[gallery],
    )
    replace_file(output, page)
    return {"output": str(output), "images": len(positions), "augment": augmentations.steps}
