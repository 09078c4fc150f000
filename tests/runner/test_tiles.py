"""Tiles: the pixels of a page are those that the model sees; masks lie over their images; no markup can enter."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from petune.base.errors import ConfigError
from petune.data import Preprocess, Split, Target
from petune.data.batches import TrainBatches
from petune.runner.report.render import render
from petune.runner.report.seen_images import Augmentations, augmented_gallery, first_batch
from petune.runner.report.tiles import Gallery, Tile, TileImage, tile_image, visible_images, with_mask


def _pixels(image: TileImage) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(image.uri.partition(",")[2]))))


def _split(count: int = 20, side: int = 16, channels: int = 3) -> Split:
    images = np.random.default_rng(0).integers(0, 256, (count, side, side, channels), np.uint8)
    return Split.of(images, np.arange(count) % 2)


CLASSES = Target("class", ("cat", "dog"))


def test_the_normalization_is_undone() -> None:
    split = _split()
    preprocess = Preprocess(16, (0.2, 0.5, 0.7), (0.3, 0.1, 0.9))
    x_BCHW = preprocess.normalize(preprocess.pixels(split, np.arange(20), torch.device("cpu")))
    assert np.array_equal(visible_images(x_BCHW, preprocess), split.images)
    gray = Preprocess(16, (0.4,), (0.2,))
    shown = visible_images(gray.normalize(preprocess.pixels(split, np.arange(20), torch.device("cpu"))), gray)
    assert np.array_equal(shown[..., 0], shown[..., 2])


@pytest.mark.parametrize("channels", [1, 2, 3, 12])
def test_any_number_of_channels_can_be_seen(channels: int) -> None:
    preprocess = Preprocess(8, (0.5,) * channels, (0.25,) * channels)
    assert visible_images(torch.zeros(2, channels, 8, 8), preprocess).shape == (2, 8, 8, 3)


def test_the_first_batch_is_that_of_the_run() -> None:
    split, preprocess = _split(), Preprocess(16, (0.5,) * 3, (0.5,) * 3)
    batches = TrainBatches(split, preprocess, "light", 20, 3, torch.device("cpu"))
    batch = next(batches.epoch(0))
    gallery = first_batch(batches, CLASSES)
    expected = visible_images(batch.x_BCHW, preprocess)
    assert len(gallery.tiles) == 16
    for i, tile in enumerate(gallery.tiles):
        assert np.array_equal(_pixels(tile.images[0]), expected[i])
        assert tile.title == CLASSES.names[int(batch.y_B[i])]
        assert tile.lines == (f"image {batch.positions[i]}",)


def test_each_image_is_shown_with_different_augmentations() -> None:
    split, preprocess = _split(), Preprocess(16, (0.5,) * 3, (0.5,) * 3)
    gallery = augmented_gallery(split, CLASSES, preprocess, np.array([4, 7]), Augmentations("shift", 3, 0))
    for position, tile in zip((4, 7), gallery.tiles, strict=True):
        original, *others = map(_pixels, tile.images)
        assert np.array_equal(original, split.images[position])
        assert len({image.tobytes() for image in (original, *others)}) == 4
        assert all(np.isin(image.reshape(-1, 3), original.reshape(-1, 3)).mean() > 0.6 for image in others)


def test_masks_color_their_image() -> None:
    pixels = np.full((4, 4, 3), 100, np.uint8)
    mask = np.array([[0, 1], [2, 255]])
    colored = with_mask(pixels, mask, 255)
    assert (colored[:2, :2] == 100).all()
    assert len(np.unique(colored[:2, 2:].reshape(-1, 3), axis=0)) == 1
    assert not np.array_equal(colored[0, 2], colored[2, 0])
    assert (colored[2:, 2:] == 30).all()


def test_only_encoded_images_are_tiles_and_names_are_escaped() -> None:
    for uri in ("https://example.org/a.png", 'data:image/png;base64,AA" onerror="alert(1)', "data:text/html;base64,AA"):
        with pytest.raises(ConfigError):
            TileImage.build({"uri": uri})
    tile = Tile(title="<script>alert(1)</script>", images=(tile_image(np.zeros((8, 8, 3), np.uint8), '"><b>'),))
    galleries = [Gallery(title="<i>", tiles=(tile,))]
    page = render("gallery.html.jinja", "petune data show", title="<u>", about=[], key=[], galleries=galleries).decode()
    assert not any(word in page for word in ("<script>", "<i>", "<u>", '"><b>'))
    assert "&lt;script&gt;alert(1)" in page
