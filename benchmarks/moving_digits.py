"""Make encoded clips of handwritten digits that move in eight directions.

python benchmarks/moving_digits.py runs/moving_digits               # 800 training clips, 160 of val, 400 of test
python benchmarks/moving_digits.py DIR --train 160 --test 80 --val 0
petune run --dataset video:runs/moving_digits ...

A still frame does not tell the direction: every digit moves in every direction equally often, starts anywhere, and
comes back on the opposite side of the frame when it leaves it, so that in each frame all positions are equally likely.
Frames in another order tell the axis at most, which is right in 1 of 4 clips. The digits of train, val and test come
from different images of scikit-learn's (UCI, 1998).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

DIRECTIONS = {
    "down": (1, 0), "down_left": (1, -1), "down_right": (1, 1), "left": (0, -1),
    "right": (0, 1), "up": (-1, 0), "up_left": (-1, -1), "up_right": (-1, 1),
}  # fmt: skip
"""Class to the movement of a frame, in y and x."""
MAX_INTENSITY = 16
SHARES = {"train": 0.6, "val": 0.15, "test": 0.25}
"""Of the images of digits."""


@dataclass(frozen=True)
class Form:
    """Form of the clips.

    Attributes:
        side: Of a frame, in pixels; even, because H.264 halves the resolution of colors.
        frames: Of a clip.
        step: Pixels that a digit moves from frame to frame, smallest and largest.
        scale: Of the digits of 8 pixels.
        codec: Of PyAV.
    """

    side: int = 40
    frames: int = 8
    step: tuple[int, int] = (2, 4)
    scale: int = 2
    codec: str = "libx264"


def make_clips(folder: Path, counts: dict[str, int], form: Form, seed: int = 0) -> None:
    """Write FOLDER/SPLIT/DIRECTION/NUMBER.mp4.

    Args:
        folder: Where to write.
        counts: Number of clips by split.
        form: Of every clip.
        seed: Decides digits, positions and speeds.
    """
    generator = np.random.default_rng(seed)
    digits = _digits_by_split(generator)
    for part, count in counts.items():
        for number in range(count):
            direction = list(DIRECTIONS)[number % len(DIRECTIONS)]
            label = number // len(DIRECTIONS) % 10
            digit_HW = generator.choice(digits[part][label])
            path = folder / part / direction / f"{number:05}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            encode(path, _frames(digit_HW, DIRECTIONS[direction], form, generator), form.codec)


def encode(path: Path, frames_THWC: NDArray[np.uint8], codec: str = "libx264") -> None:
    """Encode RGB frames as a video of 8 frames per second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8)
        stream.height, stream.width = frames_THWC.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1
        for frame_HWC in frames_THWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")))
        container.mux(stream.encode())


def _digits_by_split(generator: np.random.Generator) -> dict[str, list[NDArray[np.uint8]]]:
    """Return the images of each digit, uint8 (N, 8, 8), by split."""
    bunch = load_digits()
    gray_NHW = np.rint(bunch.images * (255 / MAX_INTENSITY)).astype(np.uint8)
    digits: dict[str, list[NDArray[np.uint8]]] = {part: [] for part in SHARES}
    for label in range(10):
        images_NHW = generator.permutation(gray_NHW[bunch.target == label])
        ends = np.cumsum([round(share * len(images_NHW)) for share in SHARES.values()])[:-1]
        for part, images in zip(SHARES, np.split(images_NHW, ends), strict=True):
            digits[part].append(images)
    return digits


def _frames(
    digit_HW: NDArray[np.uint8], direction: tuple[int, int], form: Form, generator: np.random.Generator
) -> NDArray[np.uint8]:
    """Return the frames of a clip, uint8 (T, S, S, 3)."""
    large_HW = np.kron(digit_HW, np.ones((form.scale, form.scale), np.uint8))
    canvas_SS = np.zeros((form.side, form.side), np.uint8)
    canvas_SS[: len(large_HW), : len(large_HW)] = large_HW
    start = generator.integers(0, form.side, 2)
    step = generator.integers(form.step[0], form.step[1] + 1)
    offsets_T2 = start + np.arange(form.frames)[:, None] * step * np.array(direction)
    frames_TSS = np.stack([np.roll(canvas_SS, tuple(offset), (0, 1)) for offset in offsets_T2])
    return np.repeat(frames_TSS[..., None], 3, axis=-1)


def main(words: Sequence[str]) -> None:
    """Make the clips that the command line asks for."""
    form = Form()
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=800, metavar="CLIPS")
    parser.add_argument("--val", type=int, default=160, metavar="CLIPS")
    parser.add_argument("--test", type=int, default=400, metavar="CLIPS")
    parser.add_argument("--side", type=int, default=form.side, metavar="PIXELS")
    parser.add_argument("--frames", type=int, default=form.frames)
    parser.add_argument("--codec", default=form.codec)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(words)
    counts = {part: count for part in ("train", "val", "test") if (count := getattr(args, part))}
    make_clips(args.folder, counts, Form(args.side, args.frames, codec=args.codec), args.seed)
    print(f"wrote {sum(counts.values())} clips to {args.folder}")


if __name__ == "__main__":
    main(sys.argv[1:])
