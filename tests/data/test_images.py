"""Every image mode and format becomes the right RGB square; a broken file is named in the error."""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from petune.base.errors import DataError
from petune.data.images import center_square, decode_image, decode_images
from petune.data.jpeg import jpeg_pixels

RED, HALF = (255, 0, 0), 128


def _plain(mode: str, color: object, size: tuple[int, int] = (40, 40)) -> Image.Image:
    return Image.new(mode, size, color)  # type: ignore[arg-type]


def _gray_16(path: Path, value: int) -> None:
    Image.fromarray(np.full((40, 40), value, dtype=np.uint16)).save(path)


def _palette(path: Path) -> None:
    image = _plain("P", 1)
    image.putpalette([0, 255, 0, 255, 0, 0])
    image.save(path)


def _palette_with_clear(path: Path) -> None:
    image = _plain("P", 0)
    image.putpalette([0, 255, 0, 255, 0, 0])
    image.save(path, transparency=0)


def _palette_with_alphas(path: Path) -> None:
    image = _plain("P", 1)
    image.putpalette([0, 255, 0, 255, 0, 0])
    image.save(path, transparency=b"\x00\x80")


def _animated(path: Path) -> None:
    _plain("RGB", RED).save(path, save_all=True, append_images=[_plain("RGB", (0, 0, 255))], duration=50)


def _rgb_16(path: Path) -> None:
    rows = b"".join(b"\x00" + struct.pack(">HHH", 65535, 128 * 257, 0) * 40 for _ in range(40))
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", 40, 40, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def _pgm_16(path: Path) -> None:
    path.write_bytes(b"P5\n40 40\n65535\n" + struct.pack(">H", 128 * 257) * 1600)


def _big_endian_16(path: Path) -> None:
    Image.frombytes("I;16B", (40, 40), struct.pack(">H", 128 * 257) * 1600).save(path)


FILES: dict[str, tuple[Callable[[Path], object], tuple[int, int, int]]] = {
    "rgb.png": (lambda p: _plain("RGB", RED).save(p), RED),
    "rgb.jpg": (lambda p: _plain("RGB", RED).save(p, quality=100), RED),
    "rgb.webp": (lambda p: _plain("RGB", RED).save(p, lossless=True), RED),
    "rgb.bmp": (lambda p: _plain("RGB", RED).save(p), RED),
    "gray.png": (lambda p: _plain("L", HALF).save(p), (HALF,) * 3),
    "gray.jpg": (lambda p: _plain("L", HALF).save(p), (HALF,) * 3),
    "bilevel.png": (lambda p: _plain("1", 1).save(p), (255,) * 3),
    "palette.gif": (_palette, RED),
    "palette-clear.png": (_palette_with_clear, (255,) * 3),
    "palette-alphas.png": (_palette_with_alphas, (255, 127, 127)),
    "clear-black.png": (lambda p: _plain("RGBA", (0, 0, 0, 0)).save(p), (255,) * 3),
    "half-red.png": (lambda p: _plain("RGBA", (255, 0, 0, 128)).save(p), (255, 127, 127)),
    "gray-alpha.png": (lambda p: _plain("LA", (0, 128)).save(p), (127,) * 3),
    "color-key.png": (lambda p: _plain("RGB", (0, 255, 0)).save(p, transparency=(0, 255, 0)), (255,) * 3),
    "cmyk.jpg": (lambda p: _plain("CMYK", (0, 255, 255, 0)).save(p, quality=100), RED),
    "cmyk.tif": (lambda p: _plain("CMYK", (0, 255, 255, 0)).save(p), RED),
    "gray16.png": (lambda p: _gray_16(p, 128 * 257), (128,) * 3),
    "white16.png": (lambda p: _gray_16(p, 65535), (255,) * 3),
    "dark16.tif": (lambda p: _gray_16(p, 257), (1,) * 3),
    "gray16-big-endian.tif": (_big_endian_16, (128,) * 3),
    "gray16.pgm": (_pgm_16, (128,) * 3),
    "rgb16.png": (_rgb_16, (255, 128, 0)),
    "animated.gif": (_animated, RED),
    "animated.webp": (_animated, RED),
}


@pytest.mark.parametrize("name", FILES)
def test_every_format_and_mode(name: str, tmp_path: Path) -> None:
    write, color = FILES[name]
    write(tmp_path / name)
    square = decode_image(tmp_path / name, 16)
    assert square.shape == (16, 16, 3)
    assert square.dtype == np.uint8
    assert np.abs(square.astype(int) - color).max() <= 2


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_exif_orientation_is_applied(suffix: str, tmp_path: Path) -> None:
    stored = np.zeros((40, 40, 3), dtype=np.uint8)
    stored[:20] = 255  # white above; orientation 6 means: turn by 90 degrees clockwise to see it upright
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(stored).save(tmp_path / f"x.{suffix}", exif=exif)
    seen = decode_image(tmp_path / f"x.{suffix}", 40)
    assert seen[:, 25:].min() > 200
    assert seen[:, :15].max() < 50


def test_exif_orientation_of_a_16_bit_image_is_applied(tmp_path: Path) -> None:
    stored = np.zeros((40, 40), dtype=np.uint16)
    stored[:20] = 65535
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(stored).save(tmp_path / "x.png", exif=exif)
    seen = decode_image(tmp_path / "x.png", 40)
    assert seen[:, 25:].min() > 200
    assert seen[:, :15].max() < 50


@pytest.mark.parametrize(("width", "height"), [(90, 30), (30, 90), (31, 30), (30, 299), (30, 30)])
def test_the_center_square_is_kept(width: int, height: int, tmp_path: Path) -> None:
    image = np.zeros((height, width, 3), dtype=np.uint8)
    edge = min(width, height)
    top, left = (height - edge) // 2, (width - edge) // 2
    image[top : top + edge, left : left + edge] = 200
    Image.fromarray(image).save(tmp_path / "x.png")
    square = decode_image(tmp_path / "x.png", 10)
    assert np.abs(square[2:-2, 2:-2].astype(int) - 200).max() <= 2


def test_downscaling_is_antialiased(tmp_path: Path) -> None:
    stripes = np.zeros((256, 256, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "x.png")
    assert np.abs(decode_image(tmp_path / "x.png", 16).astype(int) - 127).max() < 20


def test_a_large_jpeg_that_is_reduced_in_two_steps_stays_close_to_one(tmp_path: Path) -> None:
    y, x = np.mgrid[:800, :1000] / 6
    waves = np.stack([np.sin(x), np.sin(y), np.cos(x + y)], -1) * 100 + 128
    Image.fromarray(waves.astype(np.uint8)).save(tmp_path / "x.jpg", quality=95)
    whole = Image.open(tmp_path / "x.jpg").resize((96, 96), Image.Resampling.BICUBIC, box=(100, 0, 900, 800))
    assert np.abs(decode_image(tmp_path / "x.jpg", 96).astype(int) - np.asarray(whole)).max() <= 3


@pytest.mark.parametrize("side", [24, 96, 300])
def test_a_jpeg_gives_the_same_pixels_as_a_path_and_as_an_opened_image(side: int, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (600, 900, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "x.jpg", quality=90)
    from_path = decode_image(tmp_path / "x.jpg", side)
    with Image.open(tmp_path / "x.jpg") as image:
        assert np.array_equal(center_square(image, side), from_path)
        assert np.array_equal(center_square(image.copy(), side), from_path)
        assert np.array_equal(center_square(Image.fromarray(np.asarray(image)), side), from_path)


def _noise(form: str) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


BROKEN = {
    "empty.png": b"",
    "text.jpg": b"<html>404 not found</html>",
    "half.jpg": _noise("JPEG")[:2000],
    "half.png": _noise("PNG")[:6000],
    "half.gif": _noise("GIF")[:1000],
    "half.webp": _noise("WEBP")[:1000],
    "half.bmp": _noise("BMP")[:6000],
    "bad-crc.png": _noise("PNG")[:5000] + b"\x00\x01\x02\x03" + _noise("PNG")[5004:],
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_image_is_named_in_the_error(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(BROKEN[name])
    with pytest.raises(DataError, match="not a readable image") as caught:
        decode_image(tmp_path / name, 16)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize(("mode", "value"), [("F", 0.5), ("I", 70_000)])
def test_a_mode_without_a_white_point_is_refused(mode: str, value: float, tmp_path: Path) -> None:
    _plain(mode, value).save(tmp_path / "x.tif")
    with pytest.raises(DataError, match=f"mode {mode} has no defined white"):
        decode_image(tmp_path / "x.tif", 16)


@pytest.mark.parametrize("limit", [1000, 3000], ids=["Pillow error", "Pillow warning"])
def test_a_decompression_bomb_is_an_error(limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    _plain("RGB", RED, (64, 64)).save(tmp_path / "bomb.png")
    broken = decode_images([tmp_path / "bomb.png"], np.empty((1, 16, 16, 3), dtype=np.uint8))
    assert re.search(r"bomb\.png: not a readable image .*decompression bomb", broken[0])
    # other threads may change the filters of warnings meanwhile
    with warnings.catch_warnings(action="ignore"), pytest.raises(DataError, match=r"decompression bomb"):
        decode_image(tmp_path / "bomb.png", 16)


def test_a_jpeg_that_pillow_need_not_decode_has_its_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 17, 3), np.uint8)
    intact = Image.fromarray(pixels).resize((70, 101), Image.Resampling.BICUBIC)
    decoded, random = 0, np.random.default_rng(1)
    for number in range(120):
        buffer = io.BytesIO()
        intact.save(buffer, "JPEG", quality=40 + number % 60, subsampling=number % 3, progressive=number % 2 == 1)
        data = bytearray(buffer.getvalue())
        if number >= 40:  # damaged, and often decoded all the same
            data[random.integers(len(data) // 3, len(data) - 2)] = number
        own = jpeg_pixels(Image.open(io.BytesIO(data)))
        if own is not None:
            np.testing.assert_array_equal(own, np.asarray(Image.open(io.BytesIO(data))))
            decoded += 1
    assert decoded > 60  # with a torchvision that decodes JPEG


def test_an_unusual_jpeg_is_left_to_pillow() -> None:
    image = _plain("RGB", RED)
    turned = Image.Exif()
    turned[0x0112] = 6
    files = []
    for mode, options in (("RGB", {"exif": turned}), ("L", {}), ("CMYK", {})):
        files.append(io.BytesIO())
        image.convert(mode).save(files[-1], "JPEG", **options)  # type: ignore[arg-type]
    files.append(io.BytesIO())
    image.save(files[-1], "PNG")
    files.append(io.BytesIO(files[0].getvalue()[:-20]))
    assert [jpeg_pixels(Image.open(file)) for file in files] == [None] * 5
    assert jpeg_pixels(image) is None
    image.save(buffer := io.BytesIO(), "JPEG")
    loaded = Image.open(buffer)
    loaded.load()
    assert jpeg_pixels(loaded) is None


def test_images_are_decoded_into_their_own_rows(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(70)]
    for i, path in enumerate(paths):
        _plain("L", i, (8, 8)).save(path)
    out = np.empty((70, 4, 4, 3), dtype=np.uint8)
    decode_images(paths, out)
    assert np.array_equal(out[:, 0, 0, 0], np.arange(70))
    assert (out == out[:, :1, :1, :1]).all()


def test_broken_images_are_named_in_order(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i:03}.png" for i in range(100)]
    for path in paths:
        _plain("L", 0, (8, 8)).save(path)
    for i in (40, 90):
        paths[i].write_bytes(b"")
    broken = decode_images(paths, np.empty((100, 4, 4, 3), dtype=np.uint8))
    assert [*broken] == [40, 90]
    assert "040.png" in broken[40]
