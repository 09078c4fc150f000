"""Center squares: the pixels of timm's transform for evaluation, and the same geometry for images, bands and masks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import petune.data.cache
from petune.data.cache import Allocate, cached_split
from petune.data.images import center_square
from petune.data.squares import center_mask, center_pixels, center_plane, pixels_of, spans

SIZES = ((500, 375), (375, 500), (640, 427), (33, 31), (32, 32), (90, 33), (41, 300), (1, 1))
"""Width and height."""


def test_pixels_are_those_of_timm() -> None:
    from sklearn.datasets import load_sample_images
    from timm.data import create_transform

    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    for side, stored in ((224, 256), (56, 64)):
        transform = create_transform(side, interpolation="bicubic", mean=(0, 0, 0), std=(1 / 255,) * 3, crop_pct=0.875)
        for number, size in enumerate(((500, 375), (427, 640), (333, 87), (120, 150))):
            image = photos[number % 2].resize(size)
            expected = transform(image).numpy().transpose(1, 2, 0).round()
            margin = (stored - side) // 2
            pixels = center_square(image, stored)[margin : margin + side, margin : margin + side]
            difference = np.abs(pixels - expected)
            assert difference.max() <= 2
            assert (difference > 0).mean() < 0.02


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_images_bands_and_masks_have_the_same_geometry(share: float) -> None:
    """Resize ramps of coordinates, which resizing does not change but at borders."""
    for side in (8, 23, 64):
        for width, height in SIZES:
            rows, columns = spans(height, width, side, share)
            for span, length in ((rows, height), (columns, width)):
                low, high = (span.start + bound for bound in span.bounds)
                assert low + 1e-9 >= 0
                assert high <= length + 1e-9
                assert 1 - 1e-9 <= (high - low) / min(width, height) < 1 + 1 / side  # the longer side is rounded down
                centers = low + (np.arange(side) + 0.5) * (high - low) / side
                assert (np.abs(span.nearest + 0.5 - centers) <= 0.5 + 1e-9).all()
            x_HW = np.tile(np.arange(width, dtype=np.float32) + 0.5, (height, 1))
            if share == 0.5:
                low, high = (columns.start + bound for bound in columns.bounds)
                centers = low + (np.arange(side) + 0.5) * (high - low) / side
                inner = (centers > 2 + 2 * width / side) & (centers < width - 2 - 2 * width / side)
                plane = center_plane(Image.fromarray(x_HW), side)
                assert np.abs(plane - centers)[:, inner].max(initial=0) < 0.1
            if width <= 255:
                ramp = np.repeat(x_HW[..., None].astype(np.uint8), 3, 2)
                square = center_pixels(ramp, side, share)[..., 0] + 0.5
                low, high = (columns.start + bound for bound in columns.bounds)
                centers = low + (np.arange(side) + 0.5) * (high - low) / side
                inner = (centers > 2 + 2 * width / side) & (centers < width - 2 - 2 * width / side)
                assert np.abs(square - centers)[:, inner].max(initial=0) <= 1


def test_masks_keep_their_classes() -> None:
    mask = np.zeros((30, 50), np.uint8)
    mask[:, 25:] = 200
    square = center_mask(mask, 10)
    assert square.tolist() == [[0] * 5 + [200] * 5] * 10


def test_thin_images_need_little_memory() -> None:
    thin = np.zeros((1, 60_000, 3), np.uint8)
    thin[:, 29_990:30_010] = 200
    assert (center_pixels(thin, 64) == 200).all()
    assert spans(1, 60_000, 64)[1].resized == 8 * 64


def test_large_images_are_copied_in_strips() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (700, 1000, 3), np.uint8)
    assert np.array_equal(pixels_of(Image.fromarray(pixels)), pixels)


@pytest.mark.exhaustive
def test_pixels_do_not_depend_on_the_processor() -> None:
    code = (
        "import hashlib, numpy as np; from petune.data.squares import center_pixels; r = np.random.default_rng(0)\n"
        "images = [r.integers(0, 256, (h, w, 3), np.uint8) for h, w in ((375, 500), (50, 41), (900, 1300))]\n"
        "print(hashlib.sha256(b''.join(center_pixels(i, s).tobytes() for i in images for s in (64, 256))).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"ATEN_CPU_CAPABILITY": name},
            capture_output=True,
            check=True,
        ).stdout
        for name in ("default", "avx2", "avx512")
    }
    assert len(digests) == 1


def test_other_pixels_are_decoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PETUNE_CACHE", str(tmp_path))
    decoded = list[int]()

    def decode(allocate: Allocate) -> tuple[np.ndarray, np.ndarray]:
        allocate(2, 4)[:] = len(decoded)
        decoded.append(1)
        return np.zeros(2, np.int64), np.arange(2)

    for pixel_format, count in ((2, 1), (2, 1), (3, 2)):
        monkeypatch.setattr(petune.data.cache, "PIXEL_FORMAT", pixel_format)
        assert (np.asarray(cached_split({"files": []}, decode).images) == count - 1).all()
        assert len(decoded) == count
