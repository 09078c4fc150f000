"""Decode image files to squares of RGB and 8 bits: orientation, transparency, CMYK, 16 bit; broken files are reported.

Arrays and TIFF files with other channels are those of `petune.data.bands`.

A JPEG is decoded at its full size. Pillow's `draft` would decode a photo of 12 megapixels in 46 instead of 167 ms, but
to other pixels than those of the same image when it is given opened.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from petune.base.errors import DataError
from petune.data.band_files import ARRAY_SUFFIXES, TIFF_SUFFIXES, preview, read_bands
from petune.data.bands import RGB, ImageForm, as_image, bands_square
from petune.data.dataset import MAX_BROKEN
from petune.data.image_limit import refuse_bomb
from petune.data.jpeg import jpeg_pixels
from petune.data.squares import center_pixels, pixels_of
from petune.data.video.decode import VIDEO_SUFFIXES
from petune.data.workers import image_workers

if TYPE_CHECKING:
    from PIL.Image import Image

Converted = TypeVar("Converted")
_ALWAYS_SUPPORTED = frozenset(
    [".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".npy", ".npz", ".pbm", ".pgm", ".png", ".ppm", ".psd", ".tga", ".tif",
     ".tiff", ".webp"]
)  # fmt: skip
UNSUPPORTED_SUFFIXES = frozenset(
    [".arw", ".avif", ".cr2", ".cr3", ".dng", ".heic", ".heif", ".jp2", ".jxl", ".nef", ".raf", ".svg"]
)
"""Image formats that are not read (AVIF, HEIC and JPEG 2000 are, with a decoder); such files are reported."""
CHUNK = 32
FILE_BUFFER = 1 << 20
"""Bytes that are read at once: most files whole. In steps of 8 kB, Python's default, a JPEG takes 3 to 13 % longer."""
MAX_THREADS = 16
_LIMIT = [MAX_THREADS]
FORMATS_WITH_16_BIT = {"PNG", "PPM"}  # here mode "I" means 16 bit; in a TIFF it is 32 bit without a white point


@cache
def supported_suffixes() -> frozenset[str]:
    """Return the file suffixes of images that are read."""
    from PIL import features

    found = set(_ALWAYS_SUPPORTED)
    if features.check("avif"):
        found.add(".avif")
    if features.check("jpg_2000"):
        found.add(".jp2")
    if _has_heif():
        found |= {".heic", ".heif"}
    return frozenset(found)


def heic_advice(suffixes: Iterable[str]) -> str:
    """Return how to read HEIC, if a suffix is one of its and no decoder is installed; else an empty string."""
    is_heic = any(suffix in {".heic", ".heif"} for suffix in suffixes)
    return ", or pip install pillow-heif" if is_heic and not _has_heif() else ""


def _has_heif() -> bool:
    """Register the decoder of pillow-heif, if it is installed."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def num_threads() -> int:
    """Return how many threads prepare images: one per core, at most 16, and at most `limit_threads`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _LIMIT[0])


def limit_threads(count: int) -> None:
    """Let at most `count` threads of this process prepare images, because other runs share the machine."""
    _LIMIT[0] = min(count, MAX_THREADS)


def decode_images(paths: Sequence[Path], out: NDArray[Any], *, form: ImageForm = RGB) -> dict[int, str]:
    """Decode `paths` into `out`, one thread per core (Pillow decodes without the GIL); what is broken stays black.

    Args:
        paths: N files.
        out: (N, S, S, C), of the type and channels of `form`, filled here.
        form: See `petune.data.band_files.form_of_all`.

    Returns:
        The positions of the images that cannot be decoded, and why; see `refuse_broken`.
    """
    broken: dict[int, str] = {}

    def decode(start: int) -> None:
        for i in range(start, min(start + CHUNK, len(paths))):
            try:
                out[i] = decode_image(paths[i], out.shape[1], form)
            except DataError as error:
                out[i], broken[i] = 0, str(error)

    with warnings.catch_warnings(), image_workers(num_threads()) as workers:
        warnings.simplefilter("ignore")  # Pillow warns about odd metadata; what matters about pixels is an error
        for _ in workers.pool.map(decode, range(0, len(paths), CHUNK)):
            pass
    return dict(sorted(broken.items()))


def refuse_broken(broken: Sequence[str], total: int, max_broken: float | None, place: str, noun: str = "image") -> None:
    """Raise an error if more images are broken than may be skipped; it names only ways that work.

    Args:
        broken: A message for each, in order.
        total: Number of images.
        max_broken: Share that may be skipped; None if the user did not ask for it.
        place: The dataset, for the message.
        noun: The word for an image.

    Raises:
        DataError: With all messages in `broken`.
    """
    if not broken or (max_broken is not None and len(broken) <= max_broken * total):
        return
    others = f" and {len(broken) - 1} more of {total:,}" if len(broken) > 1 else ""
    limit = f"only {MAX_BROKEN:.0%} may be skipped"
    if len(broken) <= MAX_BROKEN * total:
        text = f"{broken[0]}{others}. Repair or remove {'them' if others else 'it'}, or skip with on_broken='skip'"
        hint = "The flag is --set on_broken=skip"
    else:
        text = f"broken {noun}s: {len(broken)} of {total:,}, and {limit}. Repair or remove them. The first: {broken[0]}"
        hint = f"`petune data check {place}` lists them all"
    error = DataError(text, cli_hint=hint)
    error.broken = tuple(broken)
    raise error


def decode_image(path: Path, side: int, form: ImageForm = RGB) -> NDArray[Any]:
    """Decode the center square of an image at `side` pixels; see `center_square`.

    Raises:
        DataError: The image is missing, broken, truncated, a decompression bomb, of a mode without a defined white, or
            has other channels than `form`.
    """
    if form != RGB:
        return bands_square(read_bands(path), side, form, str(path))
    if path.suffix.lower() in ARRAY_SUFFIXES:
        bands = read_bands(path)
        if bands.dtype == np.float32 or bands.shape[-1] not in {1, 3}:
            raise DataError(f"{path}: {ImageForm(bands.shape[-1], str(bands.dtype))}, not {RGB}")
        return center_square(as_image(bands), side)
    return read_image(path, lambda image: center_square(image, side))


def read_image(path: Path, convert: Callable[[Image], Converted]) -> Converted:
    """Open an image and return what `convert` makes of it.

    Raises:
        DataError: As `decode_image`.
    """
    from PIL import Image, UnidentifiedImageError

    suffix = path.suffix.lower()
    if suffix in ARRAY_SUFFIXES:
        return convert(preview(path))
    try:
        with path.open("rb", buffering=FILE_BUFFER) as file, Image.open(file) as image:
            refuse_bomb(image)
            return convert(image)
    except UnidentifiedImageError as error:
        if suffix in TIFF_SUFFIXES:  # bands that Pillow does not know
            return convert(preview(path))
        raise DataError(f"{path}: not a readable image ({_reason(path, error)})") from None
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except Exception as error:  # Pillow raises a dozen types, and each means that this file is broken
        raise DataError(f"{path}: not a readable image ({_reason(path, error)})") from None


def _reason(path: Path, error: Exception) -> str:
    if path.suffix.lower() in VIDEO_SUFFIXES:
        return "a video"
    if path.suffix.lower() in UNSUPPORTED_SUFFIXES:
        return f"unsupported format; convert it{heic_advice([path.suffix.lower()])}"
    return " ".join(str(error).split()) or type(error).__name__


def center_square(image: Image, side: int) -> NDArray[np.uint8]:
    """Return the center square of an image at `side` pixels, uint8 (S, S, 3); see `petune.data.squares`.

    Raises:
        ValueError: The image has a mode without a defined white.
        OSError: Pillow decodes lazily, and decoding fails.
    """
    pixels = jpeg_pixels(image)
    return center_pixels(pixels_of(_to_rgb(_upright(_to_8_bit(image)))) if pixels is None else pixels, side)


def upright_rgb(image: Image) -> Image:
    """Return an image of any mode as RGB of 8 bits, turned as its EXIF orientation says.

    Raises:
        ValueError, OSError: As `center_square`.
    """
    from PIL import ImageOps

    return _to_rgb(ImageOps.exif_transpose(_to_8_bit(image)))


def _to_8_bit(image: Image) -> Image:
    from PIL import Image

    if image.mode == "F" or (image.mode == "I" and image.format not in FORMATS_WITH_16_BIT):
        raise ValueError(f"mode {image.mode} has no defined white; convert it to 8 or 16 bit")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.float64)
    converted = Image.fromarray(np.rint(values / 257).clip(0, 255).astype(np.uint8))  # 65535 becomes 255
    converted.info["exif"] = image.getexif().tobytes()
    return converted


def _upright(image: Image) -> Image:
    """Turn an image as its EXIF orientation says; one without is not copied, unlike in Pillow."""
    from PIL import ExifTags, ImageOps

    image.load()  # a PNG may hold its EXIF data after the pixels
    return ImageOps.exif_transpose(image) if ExifTags.Base.Orientation in image.getexif() else image


def _to_rgb(image: Image) -> Image:
    from PIL import Image

    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    # On white, as a page or a viewer shows it: most such images are cut-outs and logos made for a white
    # background. Dropping alpha would reveal colors that nobody sees.
    layered = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layered.size, "white"), layered).convert("RGB")
