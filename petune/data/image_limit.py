"""Refuse images with more pixels than Pillow's limit."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image


def refuse_bomb(image: Image) -> None:
    """Raise an error where Pillow only warns: filters that turn warnings into errors are shared by all threads.

    Raises:
        DecompressionBombError: The image has more pixels than `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    from PIL import Image

    limit, pixels = Image.MAX_IMAGE_PIXELS, image.width * image.height
    if limit is not None and pixels > limit:
        raise Image.DecompressionBombError(f"a decompression bomb: {pixels:,} pixels, and the limit is {limit:,}")
