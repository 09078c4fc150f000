"""Decode the images of a table: files, bytes and arrays, to the same pixels as those of a folder."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from petune.base.config import expand_home
from petune.base.errors import DataError
from petune.base.text import plural
from petune.data.band_files import (
    check_channels_first,
    form_of,
    form_of_all,
    is_array_file,
    may_have_bands,
    read_bands,
)
from petune.data.bands import RGB, ImageForm, bands_square, is_channels_first
from petune.data.find_images import IMAGES, FileKind
from petune.data.image_limit import refuse_bomb
from petune.data.images import UNSUPPORTED_SUFFIXES, center_square, num_threads
from petune.data.tables.table import Content, Table, listed
from petune.data.video.decode import is_video
from petune.data.workers import image_workers

if TYPE_CHECKING:
    from PIL.Image import Image

CHANNELS = (1, 3)
"""Channels of arrays that become RGB."""
BYTES = (np.uint8, np.uint16)
SIDEWAYS = range(5, 9)
"""EXIF orientations that exchange width and height."""


@dataclass(frozen=True)
class ImageColumn:
    """A column of images or masks.

    Attributes:
        table: The rows.
        name: The column.
        channels_first: Arrays are (C, H, W); False for (H, W, C) of any shape, None for those that look so.
    """

    table: Table
    name: str
    channels_first: bool | None = None

    def contents(self) -> Iterator[list[Content]]:
        """Yield the images in parts: paths, bytes or arrays (H, W) or (H, W, C).

        Raises:
            DataError: A row has none, or some rows have paths and others do not.
        """
        row = 0
        first: tuple[bool, int] | None = None
        for part in self.table.contents(self.name):
            contents = []
            for value in part:
                content = self._content(value, row)
                is_path = isinstance(content, Path)
                first = first or (is_path, row)
                if is_path != first[0]:
                    paths, others = (first[1], row) if first[0] else (row, first[1])
                    path_row, other_row = self.table.row_name(paths), self.table.row_name(others)
                    raise DataError(
                        f"{self.table.title}: {self.name} holds a path in {path_row}, but an image in {other_row}. "
                        "Write all as paths, or embed all images"
                    )
                contents.append(content)
                row += 1
            yield contents

    @cached_property
    def files(self) -> list[Path] | None:
        """The files of all rows; None if the column holds bytes or arrays.

        Raises:
            DataError: A file does not exist, or a row has none.
        """
        is_text = self.table.type_of(self.name).kind == "text"
        if not is_text and not isinstance(
            next((v for part in self.table.contents(self.name) for v in part), None), str
        ):
            return None
        files = [content for part in self.contents() for content in part if isinstance(content, Path)]
        missing = [i for i, file in enumerate(files) if not file.is_file()]
        if missing:
            shown = listed([f"{files[i]} ({self.table.row_name(i)})" for i in missing], 3)
            advice = (
                f"Paths are relative to {self.table.folder}" if is_text else "It stores paths. Embed the images first"
            )
            raise DataError(
                f"{self.table.title}: {plural(len(missing), 'file')} of {self.name} missing: {shown}. {advice}"
            )
        return files

    @cached_property
    def form(self) -> ImageForm:
        """Channels and type of all images: those of the files, or of the first image in the table.

        Raises:
            DataError: Two files differ, or `channels_first` is not how a file is read.
        """
        if self.files is not None:
            self._check_layout(self.files)
            return form_of_all(self.files)
        first = next((content for part in self.contents() for content in part), None)
        if isinstance(first, bytes):
            if is_video(first):
                raise DataError(
                    f"{self.table.title}: {self.name} holds the bytes of videos, which are read from files. Write each "
                    "to a file, and put the paths into the table"
                )
            self._check_layout([first])
            return form_of(first) or RGB
        if not isinstance(first, np.ndarray) or first.ndim != 3:
            return RGB
        if self.channels_first is None and is_channels_first(first.shape):
            return RGB  # decoding refuses it
        channels, is_float = first.shape[-1], first.dtype.kind == "f"
        if channels in CHANNELS and not is_float:
            return RGB
        return ImageForm(channels, "float32" if is_float else str(first.dtype) if first.dtype in BYTES else "uint8")

    def row_name(self, row: int, content: Content) -> str:
        """Return the file of an image, or its place in the table."""
        keys = self.table.keys()
        if isinstance(content, Path):
            return str(content)
        return f"{self.table.title}, {self.table.row_name(row) if keys is None else keys[row]}"

    def _check_layout(self, sources: Sequence[Path | bytes]) -> None:
        if self.channels_first is not None:
            for source in sources:
                check_channels_first(source, self.channels_first)

    def _content(self, value: Any, row: int) -> Content:
        where = f"{self.table.title}, {self.table.row_name(row)}"
        if value is None or (isinstance(value, str | bytes) and not value.strip()):
            raise DataError(f"{where}: {self.name} is empty. Remove the row, or name its image")
        if isinstance(value, bytes):
            return value
        if isinstance(value, str):
            if "://" in value:
                raise DataError(f"{where}: {self.name} is a URL. Download the images, and write their paths")
            return self.table.folder / expand_home(value)
        try:
            array = np.asarray(value)
        except ValueError:
            raise DataError(f"{where}: {self.name} is an array with rows of different lengths") from None
        return np.moveaxis(array, 0, -1) if self.channels_first and array.ndim == 3 else array


@dataclass(frozen=True)
class Decoded:
    """Result of decoding a column.

    Attributes:
        broken: Positions of the images that cannot be decoded, and why.
        rows: int64 (N,); copies have the row of the first one.
    """

    broken: dict[int, str]
    rows: NDArray[np.int64]


def decode_column(column: ImageColumn, out: NDArray[Any]) -> Decoded:
    """Decode a column into `out`; what is broken stays black.

    Args:
        column: N images.
        out: (N, S, S, C) of the form of the column, filled here.

    Raises:
        DataError: Images have different numbers of channels.
    """
    broken: dict[int, str] = {}
    first: dict[bytes, int] = {}
    first_of_channels: dict[int, str] = {}
    rows = np.arange(len(column.table))
    form = column.form

    def decode(row: int, content: Content) -> tuple[bytes, int]:
        try:
            raw, channels, out[row] = _decode(content, out.shape[1], form)
        except Exception as error:  # Pillow raises a dozen types, and each means that this image is broken
            out[row] = 0
            broken[row] = f"{column.row_name(row, content)}: not a readable image ({_reason(content, error)})"
            return b"", 0
        return _digest(raw), channels

    for start, contents, results in map_contents(column, decode):
        for i, (digest, channels) in enumerate(results):
            if digest:
                rows[start + i] = first.setdefault(digest, start + i)
                first_of_channels.setdefault(channels, column.row_name(start + i, contents[i]))
        first_of_channels.pop(0, None)
        if len(first_of_channels) > 1:
            shown = " and ".join(f"{plural(n, 'channel')} in {name}" for n, name in first_of_channels.items())
            raise DataError(f"{column.table.title}: {column.name} has {shown}. All arrays need the same number")
    return Decoded(dict(sorted(broken.items())), rows)


def decode_content(content: Content, side: int, form: ImageForm) -> NDArray[Any]:
    """Decode an image that `decode_column` has decoded before, to the same pixels, (S, S, C)."""
    return _decode(content, side, form)[2]


def map_contents(
    column: ImageColumn, function: Callable[[int, Content], Any]
) -> Iterator[tuple[int, list[Content], list[Any]]]:
    """Call a function for each row and content, one thread per core; yield first row, contents and results of parts."""
    start = 0
    with image_workers(num_threads()) as workers:
        for contents in column.contents():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about odd metadata; what matters about pixels is an error
                results = list(workers.pool.map(function, range(start, start + len(contents)), contents))
            yield start, contents, results
            start += len(contents)


def image_size(content: Content) -> tuple[int, int]:
    """Return width and height of an image as it is shown; only bands that Pillow does not know are decoded for it.

    Raises:
        DataError: It is broken. Pillow's other errors mean the same.
    """
    from PIL import ExifTags, Image, UnidentifiedImageError

    if isinstance(content, np.ndarray):
        return content.shape[1], content.shape[0]
    try:
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
            width, height = image.size
            sideways = image.getexif().get(ExifTags.Base.Orientation) in SIDEWAYS
    except UnidentifiedImageError:
        height, width = read_bands(content).shape[:2]
        return width, height
    return (height, width) if sideways else (width, height)


def _decode(content: Content, side: int, form: ImageForm) -> tuple[bytes | NDArray[Any], int, NDArray[Any]]:
    """Return the file's bytes or the array, its number of channels (0 for a file), and the pixels."""
    raw = content.read_bytes() if isinstance(content, Path) else content
    if form != RGB:
        return raw, 0 if isinstance(raw, bytes) else raw.shape[-1], _bands(content, side, form)
    image, channels = _open(raw, content)
    with image:
        return raw, channels, center_square(image, side)


def _open(raw: bytes | NDArray[Any], content: Content) -> tuple[Image, int]:
    """Return an image, and the number of channels of an array; 0 for a file, which becomes RGB."""
    from PIL import Image

    if isinstance(content, Path | bytes) and is_array_file(content):
        raw = read_bands(content)
        form = ImageForm(raw.shape[-1], str(raw.dtype))
        if raw.shape[-1] not in CHANNELS or raw.dtype == np.float32:
            raise ValueError(f"it has {form}, not {RGB}")
    if isinstance(raw, bytes):
        image = Image.open(io.BytesIO(raw))
        refuse_bomb(image)
        return image, 0
    array = raw[:, :, 0] if raw.ndim == 3 and raw.shape[2] == 1 else raw
    channels = 1 if array.ndim == 2 else array.shape[-1]
    if array.ndim not in (2, 3) or channels not in CHANNELS:
        first = ". Use channels_first=true" if raw.ndim == 3 and is_channels_first(raw.shape) else ""
        raise ValueError(f"an array of shape {raw.shape}, not (height, width) or (height, width, channels){first}")
    return Image.fromarray(_to_uint8(array)), channels


def _bands(content: Content, side: int, form: ImageForm) -> NDArray[Any]:
    if isinstance(content, bytes) and not may_have_bands(content):
        raise ValueError(f"it is an encoded image, not {form}")
    if isinstance(content, Path | bytes):
        return bands_square(read_bands(content), side, form)
    array = content[..., None] if content.ndim == 2 else content
    if form.dtype == "uint8" and array.dtype.kind in "iub":
        array = _to_uint8(array)
    if array.dtype.kind == "f":
        if form.dtype != "float32":
            raise ValueError(f"it holds fractions, but the first array whole numbers ({form}). Write all as fractions")
        array = array.astype(np.float32)
    return bands_square(array, side, form)


def _to_uint8(array: NDArray[Any]) -> NDArray[np.uint8]:
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if array.dtype == np.uint16:
        return np.rint(array / 257).astype(np.uint8)  # 65535 becomes 255
    if array.dtype.kind not in "iu" or array.min() < 0 or array.max() > 255:
        raise ValueError(f"values of type {array.dtype} have no defined white; store uint8 or uint16")
    return array.astype(np.uint8)


def _digest(raw: bytes | NDArray[Any]) -> bytes:
    if isinstance(raw, bytes):
        return hashlib.sha256(raw).digest()
    return hashlib.sha256(f"{raw.shape} {raw.dtype}".encode() + np.ascontiguousarray(raw).tobytes()).digest()


def _reason(content: Content, error: Exception) -> str:
    if isinstance(content, Path) and content.suffix.lower() in UNSUPPORTED_SUFFIXES:
        return "unsupported format; convert it"
    if isinstance(content, bytes) and is_video(content):
        return "a video, not an image"
    text = " ".join(str(error).split()) or type(error).__name__
    return "neither an image nor its file" if "<_io.BytesIO" in text else text


def unlisted_files(paths: Sequence[Path], kind: FileKind = IMAGES) -> list[Path]:
    """Return the images, or videos, in the folders of `paths` that are not among them."""
    known = {path.resolve() for path in paths}
    folders = dict.fromkeys(path.parent for path in paths)
    found = [
        file
        for folder in folders
        for file in sorted(folder.iterdir())
        if file.suffix.lower() in kind.suffixes() and not file.name.startswith(".")
    ]
    return [file for file in found if file.resolve() not in known]
