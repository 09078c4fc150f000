"""Decode videos with PyAV, whose wheel brings FFmpeg.

Legend: F frames of a video, K of them, S side of a stored frame in pixels, V crops of a frame.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from petune.base.errors import DataError, MissingExtra
from petune.data.squares import center_pixels, pixels_of

if TYPE_CHECKING:
    from PIL.Image import Image

VIDEO_SUFFIXES = frozenset(
    [".3g2", ".3gp", ".asf", ".avi", ".divx", ".dv", ".f4v", ".flv", ".m1v", ".m2t", ".m2ts", ".m2v", ".m4v", ".mkv",
     ".mov", ".mp4", ".mpe", ".mpeg", ".mpg", ".mts", ".mxf", ".nut", ".ogm", ".ogv", ".qt", ".rm", ".rmvb", ".ts",
     ".vob", ".webm", ".wmv", ".wtv", ".y4m"]
)  # fmt: skip
ANIMATED_SUFFIXES = frozenset([".gif"])
"""Images that may be videos: read as such where videos are asked for, or are among them."""
CENTER = (0.5,)
"""Positions of the squares cut from frames, from left (or top) at 0 to right (or bottom) at 1."""
SMALLEST_SHARE = 0.9
"""Of the frames that the header of a file announces; with fewer it is truncated."""


def is_video(content: bytes) -> bool:
    """Return True if the contents of a file are a video, by how they begin: MP4 and its kin, Matroska, or AVI."""
    is_mp4 = content[4:8] == b"ftyp" and content[8:12] not in {b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1"}
    return is_mp4 or content[:4] == b"\x1a\x45\xdf\xa3" or (content[:4] == b"RIFF" and content[8:12] == b"AVI ")


@dataclass(frozen=True)
class VideoInfo:
    """The facts that one look at a video gives.

    Attributes:
        frames: F.
        width, height: Of a frame as it is shown, in pixels.
    """

    frames: int
    width: int
    height: int


def check_decoder() -> None:
    """Check that PyAV is installed.

    Raises:
        MissingExtra: It is not.
    """
    try:
        import av  # noqa: F401
    except ImportError:
        raise MissingExtra("reading videos", "video") from None


def read_info(path: Path) -> VideoInfo:
    """Decode a video once, and count its frames: headers may be wrong, or not know the number.

    Raises:
        DataError: It cannot be read, or is truncated.
        MissingExtra: PyAV is not installed.
    """
    with _opened(path) as (container, stream):
        packets = frames = 0
        first = None
        for packet in container.demux(stream):
            packets += packet.size > 0
            for frame in packet.decode():
                first = first or (frame.width, frame.height, _axes(frame))
                frames += 1
        announced = stream.frames
    if first is None:
        raise DataError(f"{path}: not a readable video (no frames)")
    if packets < SMALLEST_SHARE * announced:
        raise DataError(f"{path}: not a readable video (truncated: {packets} of {announced} frames)")
    width, height, axes = first
    return VideoInfo(frames, height, width) if axes[1] else VideoInfo(frames, width, height)


def read_frames(
    path: Path, numbers: NDArray[np.int64], side: int, crops: Sequence[float] = CENTER
) -> NDArray[np.uint8]:
    """Decode some frames of a video.

    Args:
        path: The file.
        numbers: Which frames, in order, each once.
        side: S.
        crops: Where squares are cut; see `CENTER`.

    Returns:
        uint8 (V, K, S, S, 3).

    Raises:
        DataError: The file cannot be read, or has fewer frames.
        MissingExtra: PyAV is not installed.
    """
    out = np.empty((len(crops), len(numbers), side, side, 3), np.uint8)
    position = 0
    with _opened(path) as (container, stream):
        for number, frame in enumerate(container.decode(stream)):
            if number < numbers[position]:
                continue
            image = _upright(frame)
            for crop, share in enumerate(crops):
                out[crop, position] = _square(image, side, share)
            position += 1
            if position == len(numbers):
                return out
    raise DataError(f"{path}: not a readable video (frame {numbers[position]} is missing)")


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """Open a video, and raise a DataError for whatever is wrong with it."""
    check_decoder()
    import av

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise DataError(f"{path}: not a readable video (no video stream)")
            stream = container.streams.video[0]
            stream.thread_count = 1  # videos are decoded side by side
            yield container, stream
    except av.FFmpegError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"not a readable video ({error.strerror})"
        raise DataError(f"{path}: {reason}") from None


def _upright(frame: Any) -> Image:
    """Return a frame turned and mirrored as its file says; FFmpeg's libraries leave that to the program."""
    from PIL import Image

    image: Image.Image = frame.to_image()
    axes = _axes(frame)
    if axes == (1, 0, 0, 1):
        return image
    steps = {
        (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
        (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
        (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
        (0, 1, -1, 0): Image.Transpose.ROTATE_270,
        (0, -1, 1, 0): Image.Transpose.ROTATE_90,
        (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
        (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
    }
    return image.transpose(steps[axes])


def _axes(frame: Any) -> tuple[int, int, int, int]:
    """Return where the axes of a frame point: (a, b, c, d) shows what is at (x, y) at (ax + cy, bx + dy).

    Angles between are rounded to a multiple of 90 degrees.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return (1, 0, 0, 1)
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    if abs(a) >= abs(b):
        return (1 if a >= 0 else -1, 0, 0, 1 if d >= 0 else -1)
    return (0, 1 if b >= 0 else -1, 1 if c >= 0 else -1, 0)


def _square(image: Image, side: int, share: float) -> NDArray[np.uint8]:
    """Return a square as high (or wide) as the frame at `side` pixels, as of an image."""
    return center_pixels(pixels_of(image), side, share)
