"""From image files to uint8 RGB squares: orientation, transparency, CMYK, 16 bit; broken ones are named."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from petune.base.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

_ALWAYS = frozenset(
    [".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"]
)
OTHER_IMAGES = frozenset(
    [".arw", ".avif", ".cr2", ".cr3", ".dng", ".heic", ".heif", ".jp2", ".jxl", ".nef", ".psd", ".raf", ".svg", ".tga"]
)
"""Kinds of images that are not read (AVIF is where Pillow can); where there are any, it is said."""
CHUNK = 32
HOLDS_16_BIT = {"PNG", "PPM"}  # where mode "I" means 16 bit; in a TIFF it is 32 bit without a white point


@cache
def extensions() -> frozenset[str]:
    """What the names of images that are read end in."""
    from PIL import features

    return _ALWAYS | {".avif"} if features.check("avif") else _ALWAYS


def decode_images(paths: Sequence[Path], out: NDArray[np.uint8], *, skip: bool = False) -> dict[int, str]:
    """Decode `paths` into `out`, uint8 (N, S, S, 3), with a thread a core (Pillow decodes without the GIL).

    Returns:
        With `skip`, the positions of the images that cannot be decoded, and why; they stay black.

    Raises:
        DataError: Without `skip`: the first image, in order, that cannot be decoded, with its path.
    """
    from PIL.Image import DecompressionBombWarning

    broken: dict[int, str] = {}

    def decode(start: int) -> None:
        for i in range(start, min(start + CHUNK, len(paths))):
            try:
                out[i] = decode_image(paths[i], out.shape[1])
            except DataError as error:
                if not skip:
                    raise DataError(f"{error}. Mend it, take it away, or --set on_broken=skip (at most 1 %)") from None
                out[i], broken[i] = 0, str(error)

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with warnings.catch_warnings(), ThreadPoolExecutor(min(cores, 16)) as pool:
        warnings.simplefilter("ignore", UserWarning)  # Pillow's remarks on odd metadata, not on pixels
        warnings.simplefilter("error", DecompressionBombWarning)
        for _ in pool.map(decode, range(0, len(paths), CHUNK)):
            pass
    return dict(sorted(broken.items()))


def decode_image(path: Path, side: int) -> NDArray[np.uint8]:
    """The centred square of an image at `side` pixels; see `square_of`.

    Raises:
        DataError: It is broken, truncated, a decompression bomb, or of a kind without a defined white.
    """
    from PIL import Image

    try:
        with Image.open(path) as opened:
            opened.draft(None, (2 * side, 2 * side))  # a large JPEG is decoded at 1/2, 1/4 or 1/8 of its size
            return square_of(opened, side)
    except Exception as error:  # Pillow raises a dozen types, and each means that this file is bad
        reason = " ".join(str(error).split()) or type(error).__name__
        if path.suffix.lower() in OTHER_IMAGES:
            reason += " (convert it, this kind is not read)"
        raise DataError(f"{path} must be a whole image, but: {reason}") from None


def square_of(opened: Image, side: int) -> NDArray[np.uint8]:
    """The centred square of an image at `side` pixels, uint8 (S, S, 3), bicubic with antialiasing.

    Raises:
        ValueError: It is of a kind without a defined white.
        OSError: What Pillow raises where it decodes only now, and cannot.
    """
    from PIL import Image, ImageOps

    image = _to_rgb(ImageOps.exif_transpose(_to_8_bit(opened)))
    width, height = image.size
    edge = min(width, height)
    left, top = (width - edge) / 2, (height - edge) / 2
    box = (left, top, left + edge, top + edge)
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0))


def _to_8_bit(image: Image) -> Image:
    from PIL import Image

    if image.mode == "F" or (image.mode == "I" and image.format not in HOLDS_16_BIT):
        raise ValueError(f"mode {image.mode} has no defined white (convert it to 8 or 16 bit)")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.float64)
    eight = Image.fromarray(np.rint(values / 257).clip(0, 255).astype(np.uint8))  # 65535 becomes 255
    eight.info["exif"] = image.getexif().tobytes()
    return eight


def _to_rgb(image: Image) -> Image:
    from PIL import Image

    if not image.has_transparency_data:
        return image.convert("RGB")
    # On white, as a page or a viewer shows it: most such images are cut-outs and logos made for a white
    # ground, and dropping alpha instead would show colours that nobody sees.
    seen = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")
