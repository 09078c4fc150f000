"""Tiles of a gallery: images as data URIs with text below, for HTML pages that load nothing.

Shapes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import StringConstraints
from torch import Tensor

from petune.base.config import Config
from petune.data import Preprocess
from petune.data.video.clips import frame_grid

MAX_SIDE = 192
"""Pixels; larger images are scaled down, so that a page of a hundred stays small."""
MAX_LOSSLESS = 64
"""Images up to this side in pixels are PNG; JPEG would blur them."""
COLORS = (
    (230, 25, 75), (60, 180, 75), (255, 225, 25), (0, 130, 200), (245, 130, 48), (145, 30, 180), (70, 240, 240),
    (240, 50, 230), (210, 245, 60), (250, 190, 212), (0, 128, 128), (220, 190, 255), (170, 110, 40), (128, 0, 0),
    (170, 255, 195), (128, 128, 0), (255, 215, 180), (0, 0, 128),
)  # fmt: skip
"""Colors of the classes of a mask, in their order; class 0, usually the background, is not colored."""

DataUri = Annotated[str, StringConstraints(pattern=r"^data:image/(png|jpeg);base64,[A-Za-z0-9+/]+={0,2}$")]


class TileImage(Config):
    """An image of a tile.

    Attributes:
        uri: The image.
        caption: A word below it; empty for none.
        is_small: It has fewer pixels than it is shown with, so that they are shown as squares.
    """

    uri: DataUri
    caption: str = ""
    is_small: bool = False


class Tile(Config):
    """Images that belong together, with text.

    Attributes:
        title: The first line, such as the class.
        lines: Further lines.
        images: One or several.
    """

    title: str
    lines: tuple[str, ...] = ()
    images: tuple[TileImage, ...] = ()


class Gallery(Config):
    """Tiles under a heading.

    Attributes:
        title: The heading.
        about: A sentence.
        tiles: In the order in which they are shown.
    """

    title: str
    about: str = ""
    tiles: tuple[Tile, ...] = ()


class Galleries(Config):
    """The galleries of a file."""

    galleries: tuple[Gallery, ...] = ()


def galleries_file(galleries: Sequence[Gallery]) -> bytes:
    """Return the content of a file of galleries."""
    return (Galleries(galleries=tuple(galleries)).model_dump_json() + "\n").encode()


def tile_image(pixels_HWC: NDArray[np.uint8], caption: str = "") -> TileImage:
    """Encode an image, uint8 (H, W, 3)."""
    from PIL import Image

    image = Image.fromarray(pixels_HWC)
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    is_small = max(pixels_HWC.shape[:2]) <= MAX_LOSSLESS
    if is_small:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "JPEG", quality=88)
    kind = "png" if is_small else "jpeg"
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return TileImage(uri=f"data:image/{kind};base64,{encoded}", caption=caption, is_small=is_small)


def visible_images(x_BCHW: Tensor, preprocess: Preprocess) -> NDArray[np.uint8]:
    """Undo the normalization of a model's input.

    Args:
        x_BCHW: Normalized images, or clips (B, T, C, H, W).
        preprocess: Its mean and std.

    Returns:
        uint8 (B, H, W, 3). One channel is gray; of more than three the first three are shown. A clip is four of its
        frames, as in `frame_grid`.
    """
    if x_BCHW.ndim == 5:
        frames = visible_images(x_BCHW.flatten(0, 1), preprocess)
        return frame_grid(frames.reshape(*x_BCHW.shape[:2], *frames.shape[1:]))
    statistics = torch.tensor([preprocess.mean, preprocess.std]).view(2, 1, -1, 1, 1)
    pixels_BCHW = (x_BCHW.detach().float().cpu() * statistics[1] + statistics[0]) * 255
    channels = pixels_BCHW.shape[1]
    if channels == 1:
        pixels_BCHW = pixels_BCHW.expand(-1, 3, -1, -1)
    elif channels == 2:
        pixels_BCHW = torch.cat([pixels_BCHW, torch.zeros_like(pixels_BCHW[:, :1])], 1)
    shown = pixels_BCHW[:, :3].round().clamp(0, 255).byte().permute(0, 2, 3, 1)
    result: NDArray[np.uint8] = np.ascontiguousarray(shown.numpy())
    return result


def with_mask(pixels_HWC: NDArray[np.uint8], mask_HW: NDArray[Any], ignore_index: int) -> NDArray[np.uint8]:
    """Color an image by the classes of a mask; pixels that do not count are darkened.

    Args:
        pixels_HWC: uint8 (H, W, 3).
        mask_HW: Classes, of any size; it is scaled to the image without blending.
        ignore_index: Value of the pixels that do not count.
    """
    height, width = pixels_HWC.shape[:2]
    rows = np.arange(height) * mask_HW.shape[0] // height
    columns = np.arange(width) * mask_HW.shape[1] // width
    classes_HW = mask_HW[rows][:, columns].astype(np.int64)
    palette = np.array(COLORS, np.float32)
    blended = pixels_HWC.astype(np.float32)
    is_class = (classes_HW > 0) & (classes_HW != ignore_index)
    blended[is_class] = 0.45 * blended[is_class] + 0.55 * palette[(classes_HW[is_class] - 1) % len(palette)]
    blended[classes_HW == ignore_index] *= 0.3
    return blended.round().astype(np.uint8)


def mask_key(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return color and name of each class of a mask, without the background."""
    shown = []
    for number, name in enumerate(names[1:]):
        red, green, blue = COLORS[number % len(COLORS)]
        shown.append((f"rgb({red}, {green}, {blue})", name))
    return shown
