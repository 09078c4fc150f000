"""Images of any number of channels: arrays, TIFF files with bands or pages, and what stays RGB."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from petune.base.errors import DataError
from petune.data import Split, load_dataset
from petune.data.band_files import form_of, form_of_all, read_bands
from petune.data.bands import RGB, ImageForm, bands_square
from petune.data.check import check_dataset
from petune.data.images import decode_image, supported_suffixes

RNG = np.random.default_rng(0)


def _bands(channels: int, dtype: str, side: int = 8) -> np.ndarray[Any, Any]:
    values = RNG.random((side, side, channels)) * (1 if dtype == "float32" else np.iinfo(dtype).max)
    return values.astype(dtype)


def _save_pages(path: Path, pages: np.ndarray[Any, Any]) -> None:
    first, *rest = (Image.fromarray(np.ascontiguousarray(pages[..., i])) for i in range(pages.shape[-1]))
    first.save(path, save_all=True, append_images=rest)


def _save_tiff(path: Path, bands: np.ndarray[Any, Any]) -> None:
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(path, bands, photometric="minisblack", planarconfig="contig")


SAVE: dict[str, Callable[[Path, Any], object]] = {
    "x.npy": np.save,
    "x.npz": np.savez_compressed,
    "pages.tif": _save_pages,
    "bands.tif": _save_tiff,
}


@pytest.mark.parametrize("name", SAVE)
@pytest.mark.parametrize(("channels", "dtype"), [(12, "uint16"), (4, "uint8"), (2, "float32"), (5, "float32")])
def test_every_channel_is_kept_to_the_bit(name: str, channels: int, dtype: str, tmp_path: Path) -> None:
    bands = _bands(channels, dtype)
    SAVE[name](tmp_path / name, bands)
    form = ImageForm(channels, dtype)
    assert form_of(tmp_path / name) == form
    assert np.array_equal(read_bands(tmp_path / name), bands)
    assert np.array_equal(decode_image(tmp_path / name, 8, form), bands)


def test_channels_first_and_other_types(tmp_path: Path) -> None:
    bands = _bands(12, "uint16", side=16)
    np.save(tmp_path / "first.npy", bands.transpose(2, 0, 1))
    np.save(tmp_path / "big_endian.npy", bands.astype(">u2"))
    np.save(tmp_path / "signed.npy", bands.astype(np.int64) - 40_000)
    assert np.array_equal(read_bands(tmp_path / "first.npy"), bands)
    assert form_of(tmp_path / "big_endian.npy") == ImageForm(12, "uint16")
    assert np.array_equal(read_bands(tmp_path / "big_endian.npy"), bands)
    assert form_of(tmp_path / "signed.npy") == ImageForm(12, "float32")
    assert read_bands(tmp_path / "signed.npy").min() < 0


def test_what_people_look_at_stays_rgb(tmp_path: Path) -> None:
    color = _bands(3, "uint8")
    np.save(tmp_path / "color.npy", color)
    np.save(tmp_path / "gray.npy", color[..., 0])
    np.save(tmp_path / "gray16.npy", color[..., :1].astype(np.uint16) * 257)
    Image.fromarray(color).save(tmp_path / "color.tif")
    Image.fromarray(color).convert("CMYK").save(tmp_path / "cmyk.tif")
    Image.fromarray(color).convert("RGBA").save(tmp_path / "alpha.tif")
    Image.fromarray(color[..., 0].astype(np.uint16) * 257).save(tmp_path / "gray16.tif")
    Image.fromarray(color).save(tmp_path / "two.tif", save_all=True, append_images=[Image.new("RGB", (4, 4))])
    assert form_of_all(sorted(tmp_path.iterdir())) == RGB
    assert np.array_equal(decode_image(tmp_path / "color.npy", 8), color)
    for name in ("gray.npy", "gray16.npy", "gray16.tif"):
        assert np.array_equal(decode_image(tmp_path / name, 8), np.repeat(color[..., :1], 3, -1)), name
    np.save(tmp_path / "float.npy", _bands(1, "float32"))
    assert form_of(tmp_path / "float.npy") == ImageForm(1, "float32")


def test_resizing_neither_wraps_nor_mixes_channels() -> None:
    bands = np.zeros((6, 10, 4), np.uint16)
    bands[..., 1], bands[:, 5:, 2], bands[..., 3] = 65535, 65535, 7
    square = bands_square(bands, 3, ImageForm(4, "uint16"))
    assert square.shape == (3, 3, 4)
    assert (square[..., 0] == 0).all()
    assert (square[..., 1] == 65535).all()
    assert (square[..., 3] == 7).all()
    assert (square[:, 0, 2] < 7000).all()
    assert (square[:, 2, 2] > 60_000).all()


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_statistics_of_each_channel(dtype: str) -> None:
    images = np.stack([_bands(5, dtype) for _ in range(70)])
    images[..., 4] = images[0, 0, 0, 4]
    split = Split.of(images, np.zeros(70, np.int64))
    mean, std = split.channel_statistics()
    scaled = images / {"uint8": 255, "uint16": 65535, "float32": 1}[dtype]
    assert mean == pytest.approx(scaled.mean((0, 1, 2), dtype=np.float64), rel=1e-4)
    assert std[:4] == pytest.approx(scaled.std((0, 1, 2), dtype=np.float64)[:4], rel=1e-4)
    assert std[4] > 0


def test_a_folder_keeps_the_channels(tmp_path: Path) -> None:
    for name in ("field", "forest"):
        (tmp_path / name).mkdir()
        for number in range(6):
            np.save(tmp_path / name / f"{number}.npy", _bands(12, "uint16", side=32))
    dataset = load_dataset(f"folder:{tmp_path}", image_size=14)
    assert dataset.train.images.shape[1:] == (16, 16, 12)
    assert dataset.train.images.dtype == np.uint16
    on_request = load_dataset(f"folder:{tmp_path}", image_size=14, cache_gb=0)
    rows = dataset.train.rows
    assert on_request.train.images.dtype == np.uint16
    assert np.array_equal(on_request.train.images[rows], dataset.train.images[rows])
    assert check_dataset(f"folder:{tmp_path}").is_sound


def test_a_table_keeps_the_channels(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = [_bands(12, "uint16", side=16) for _ in range(10)]
    labels = ["field", "forest"] * 5
    for number, bands in enumerate(images):
        np.save(tmp_path / f"{number}.npy", bands)
    lines = [f"{number}.npy,{label}" for number, label in enumerate(labels)]
    (tmp_path / "files.csv").write_text("image,label\n" + "\n".join(lines) + "\n")
    kind = pa.list_(pa.list_(pa.list_(pa.uint16())))
    column = pa.array([bands.tolist() for bands in images], kind)
    pq.write_table(pa.table({"image": column, "label": labels}), tmp_path / "arrays.parquet")
    for name in ("files.csv", "arrays.parquet"):
        train = load_dataset(f"table:{tmp_path / name}", image_size=14).train
        assert train.images.shape[1:] == (16, 16, 12), name
        assert train.images.dtype == np.uint16
        pixels = train.images[train.rows]
        assert all(any(np.array_equal(image, bands) for bands in images) for image in pixels), name
    np.save(tmp_path / "3.npy", _bands(11, "uint16"))
    with pytest.raises(DataError, match=r"0\.npy has 12 .* 3\.npy has 11|0\.npy has 12 .*3\.npy has 11"):
        load_dataset(f"table:{tmp_path / 'files.csv'}", image_size=14)


def test_mixed_images_are_named(tmp_path: Path) -> None:
    folders = [tmp_path / "data" / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir(parents=True)
        for number in range(3):
            np.save(folder / f"{number}.npy", _bands(4, "uint8"))

    def refused(*words: str) -> None:
        with pytest.raises(DataError) as caught:
            load_dataset(f"folder:{tmp_path / 'data'}", image_size=8)
        assert all(word in str(caught.value) for word in words), str(caught.value)

    np.save(folders[1] / "2.npy", _bands(5, "uint8"))
    refused(str(folders[0] / "0.npy"), "4 channels", str(folders[1] / "2.npy"), "5 channels")
    np.save(folders[1] / "2.npy", _bands(4, "uint16"))
    refused("2.npy", "uint16")
    (folders[1] / "2.npy").unlink()
    Image.new("RGB", (8, 8)).save(folders[1] / "2.png")
    refused("0.npy", "2.png", "3 channels")


def test_broken_arrays_are_named(tmp_path: Path) -> None:
    form = ImageForm(4, "float32")
    bands = _bands(4, "float32")
    bands[0, 0, 0] = np.nan
    np.save(tmp_path / "nan.npy", bands)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "nan.npy").read_bytes()[:200])
    np.savez(tmp_path / "two.npz", first=bands, second=bands)
    np.save(tmp_path / "objects.npy", np.array([{}, {}], object))
    np.save(tmp_path / "flat.npy", np.zeros(5))
    for name, words in {
        "nan.npy": "NaN", "cut.npy": "not a readable image", "two.npz": "first, second", "objects.npy": "not",
        "flat.npy": "shape", "missing.npy": "no such file",
    }.items():  # fmt: skip
        with pytest.raises(DataError, match=words) as caught:
            decode_image(tmp_path / name, 8, form)
        assert name in str(caught.value)
    np.savez(tmp_path / "named.npz", image=_bands(4, "float32"), date=np.zeros(3))
    assert decode_image(tmp_path / "named.npz", 8, form).shape == (8, 8, 4)


@pytest.mark.parametrize(("shape", "layout"), [((4, 20, 6), "contig"), ((13, 5, 4), "separate")])
def test_a_tiff_says_where_its_channels_are(tmp_path: Path, shape: tuple[int, ...], layout: str) -> None:
    """Its shape alone would say the opposite."""
    tifffile = pytest.importorskip("tifffile")
    bands = RNG.random(shape).astype("float32")
    tifffile.imwrite(tmp_path / "x.tif", bands, photometric="minisblack", planarconfig=layout)
    expected = bands if layout == "contig" else bands.transpose(1, 2, 0)
    np.testing.assert_array_equal(read_bands(tmp_path / "x.tif"), expected)
    assert form_of(tmp_path / "x.tif") == ImageForm(expected.shape[-1], "float32")


def test_pages_are_channels_however_small_the_image(tmp_path: Path) -> None:
    pages = RNG.random((5, 4, 13)).astype("float32")
    _save_pages(tmp_path / "x.tif", pages)
    np.testing.assert_array_equal(read_bands(tmp_path / "x.tif"), pages)


def test_a_tiff_that_needs_tifffile_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    _save_tiff(tmp_path / "x.tif", _bands(12, "uint16"))
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(DataError, match="pip install tifffile"):
        decode_image(tmp_path / "x.tif", 8, form_of(tmp_path / "x.tif"))


def test_formats_that_pillow_reads(tmp_path: Path) -> None:
    image = Image.new("RGB", (9, 9), (200, 10, 10))
    for suffix in sorted({".avif", ".jp2", ".tga"} & supported_suffixes()):
        image.save(tmp_path / f"x{suffix}")
        assert decode_image(tmp_path / f"x{suffix}", 8)[4, 4].tolist() == pytest.approx([200, 10, 10], abs=6)


def test_channels_first_is_obeyed_or_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    shapes = {"few": (5, 16, 20), "many": (40, 16, 20)}  # (C, H, W); more bands than pixels look like (H, W, C)
    for name, shape in shapes.items():
        arrays = rng.integers(0, 60000, (10, *shape), dtype=np.uint16)
        for number, array in enumerate(arrays):
            np.save(tmp_path / f"{name}{number}.npy", array)
        lines = [f"{name}{number}.npy,{'ab'[number % 2]}" for number in range(10)]
        (tmp_path / f"{name}.csv").write_text("image,label\n" + "\n".join(lines) + "\n")
        column = pa.array(arrays.tolist(), pa.list_(pa.list_(pa.list_(pa.uint16()))))
        pq.write_table(pa.table({"image": column, "label": list("ab" * 5)}), tmp_path / f"{name}.parquet")

    def channels(table: str, option: str = "") -> int:
        return int(load_dataset(f"table:{tmp_path / table}{option}", image_size=14).train.images.shape[-1])

    first, last = ",channels_first=true", ",channels_first=false"
    assert [channels("few.csv"), channels("few.csv", first), channels("few.parquet", first)] == [5, 5, 5]
    assert [channels("many.csv"), channels("many.csv", last), channels("many.parquet", first)] == [20, 20, 40]
    assert channels("few.parquet", last) == 20
    for table, option, layout in (("few.csv", last, "channels, height"), ("many.csv", first, "height, width")):
        with pytest.raises(DataError, match=rf"is read as \({layout}.*channels_first=\w+ says otherwise"):
            channels(table, option)
