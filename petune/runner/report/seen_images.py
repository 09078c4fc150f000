"""Show images as a model sees them: after preprocessing and augmentation, with the normalization undone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from petune.data import Preprocess, Split, Target
from petune.data.batches import Batch, TrainBatches, eval_batches, num_views
from petune.data.steps import StepConfig
from petune.runner.report.tiles import Gallery, Tile, TileImage, tile_image, visible_images, with_mask

NUM_SHOWN = 16
"""Images of a run's first batch that its report shows."""


@dataclass(frozen=True)
class Augmentations:
    """Augmentations of the images of a page.

    Attributes:
        steps: The name of the augmentation, or a list; `none` shows the images only.
        times: Number of augmentations of each image.
        seed: Seed of the augmentations.
    """

    steps: str | list[StepConfig]
    times: int
    seed: int

    def __str__(self) -> str:
        if isinstance(self.steps, str):
            return self.steps
        return ", ".join(step if isinstance(step, str) else next(iter(step)) for step in self.steps)


def first_batch(batches: TrainBatches, target: Target) -> Gallery:
    """Return the first images of the first epoch, exactly as the model will see them."""
    batch = next(batches.epoch(0, part=lambda size: slice(0, NUM_SHOWN)))
    columns = [_encoded(batch, batches.preprocess, target)]
    title = "First training images, as the model sees them"
    return Gallery(title=title, tiles=_tiles(batches.split, target, batch.positions, columns))


def augmented_gallery(
    split: Split, target: Target, preprocess: Preprocess, positions: NDArray[np.int64], augmentations: Augmentations
) -> Gallery:
    """Show images without augmentation, and after several random augmentations.

    Args:
        split: The images.
        target: Kind and names of their targets.
        preprocess: Size and statistics of the model's input.
        positions: Images to show.
        augmentations: How they are augmented.
    """
    device = torch.device("cpu")
    (plain,) = eval_batches(split.take(positions), preprocess, len(positions) * num_views(split), device)
    columns = [_encoded(plain, preprocess, target, "original")]
    times = 0 if augmentations.steps == "none" else augmentations.times
    if times:
        repeated = split.take(np.repeat(positions, times))
        batches = TrainBatches(repeated, preprocess, augmentations.steps, len(repeated), augmentations.seed, device)
        batch = next(batches.epoch(0))
        images = dict(zip(batch.positions.tolist(), _encoded(batch, preprocess, target), strict=True))
        columns += [[images[i * times + k] for i in range(len(positions))] for k in range(times)]
    return Gallery(title="", tiles=_tiles(split, target, positions, columns))


def _tiles(
    split: Split, target: Target, positions: NDArray[np.int64], columns: Sequence[Sequence[TileImage]]
) -> tuple[Tile, ...]:
    tiles = []
    for position, *images in zip(positions.tolist(), *columns, strict=True):
        text = target.text(split.targets_at(np.array([position]))[0])
        name = image_name(split, position)
        tiles.append(Tile(title=text or name, lines=(name,) if text else (), images=tuple(images)))
    return tuple(tiles)


def image_name(split: Split, position: int) -> str:
    """Return the file or key of an image, or its position."""
    return f"image {position}" if split.names is None else str(split.names[position])


def _encoded(batch: Batch, preprocess: Preprocess, target: Target, caption: str = "") -> list[TileImage]:
    pixels_BHWC = visible_images(batch.x_BCHW[:: batch.views], preprocess)
    if target.kind == "mask":
        masks = batch.y_B.cpu().numpy()
        pixels_BHWC = np.stack([with_mask(*pair, target.ignore_index) for pair in zip(pixels_BHWC, masks, strict=True)])
    return [tile_image(pixels, caption) for pixels in pixels_BHWC]
