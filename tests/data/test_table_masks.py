"""Masks of a table: palette and gray files, unknown values, other sizes, ignored pixels, the first class."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional as F

from petune.base.errors import DataError
from petune.data.lookup import dataset_target
from tests.data.tables import digit, load, write_table

COUNT = 10


def masks_of(first: int = 0, side: int = 16) -> list[NDArray[np.uint8]]:
    """Return masks of digits in three classes: dark, half, light."""
    return [(digit(i, side) // 86 + first).astype(np.uint8) for i in range(COUNT)]


def write(folder: Path, masks: list[NDArray[Any]], mode: str = "L", side: int = 16) -> Path:
    """Write digits, their masks and a table of both."""
    rows = []
    for i, mask in enumerate(masks):
        Image.fromarray(digit(i, side)).save(folder / f"{i}.png")
        image = Image.fromarray(mask)
        if mode == "P":
            image = image.convert("P")
            image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, *[7] * 759])
            image.putdata(mask.reshape(-1).tolist())
        image.save(folder / f"m{i}.png")
        rows.append({"image": f"{i}.png", "mask": f"m{i}.png"})
    return write_table(folder / "t.csv", rows)


@pytest.mark.parametrize("mode", ["L", "P"])
def test_masks_are_cut_as_their_images(mode: str, tmp_path: Path) -> None:
    masks = masks_of()
    dataset = load(write(tmp_path, masks, mode), image_size=14)
    assert (dataset.target.kind, dataset.classes) == ("mask", ("0", "1", "2"))
    split = dataset.train
    assert split.targets.shape == (COUNT, 16, 16)
    assert split.names is not None
    for position in range(len(split)):
        expected = masks[int(Path(split.names[position]).stem)]
        assert np.array_equal(split.targets_at(np.array([position]))[0], expected)


def test_resizing_takes_the_nearest_pixel_exactly(tmp_path: Path) -> None:
    masks = masks_of(side=32)
    dataset = load(write(tmp_path, masks, side=32), image_size=17)
    side = dataset.train.targets.shape[1]
    for i, mask in enumerate(masks):
        exact = F.interpolate(torch.from_numpy(mask)[None, None].float(), (side, side), mode="nearest-exact")
        assert np.array_equal(dataset.train.targets[i], exact[0, 0].numpy().astype(np.uint8))


def test_named_values_and_ignored_pixels(tmp_path: Path) -> None:
    masks = masks_of()
    masks[0][0] = 255
    path = write(tmp_path, masks)
    dataset = load(path, "classes=[dark,half,light]", image_size=14)
    assert dataset.classes == ("dark", "half", "light")
    assert dataset.target.ignore_index == 255
    assert {*np.unique(dataset.train.targets[0])} >= {255}
    with pytest.raises(DataError, match="the value 255"):
        load(path, "classes={2: light, 0: dark},ignore=1", image_size=14)
    mapped = load(path, "classes={2: light, 0: dark, 1: half},ignore=255", image_size=14).train
    swapped = np.array([1, 2, 0])[np.minimum(masks[1], 2)]
    assert np.array_equal(mapped.targets[1], swapped)


def test_values_of_0_and_255(tmp_path: Path) -> None:
    path = write(tmp_path, [(mask > 1).astype(np.uint8) * 255 for mask in masks_of()])
    with pytest.raises(DataError, match=r"classes=\{0: background, 255: object\}"):
        load(path, image_size=14)
    dataset = load(path, "classes={0: background, 255: object}", image_size=14)
    assert {*np.unique(dataset.train.targets)} == {0, 1}


def test_trimaps_start_at_one(tmp_path: Path) -> None:
    path = write(tmp_path, masks_of(first=1))
    for load_or_name in (lambda: load(path, image_size=14), lambda: dataset_target(str(path))):
        with pytest.raises(DataError, match="first_class=1"):
            load_or_name()
    with pytest.raises(DataError, match="first_class=1"):
        load(path, "classes=[a,b,c]", image_size=14)
    assert load(path, "first_class=1", image_size=14).classes == ("1", "2", "3")
    dataset = load(path, "first_class=1,classes=[a,b,c]", image_size=14)
    assert {*np.unique(dataset.train.targets)} == {0, 1, 2}
    assert dataset_target(f"table:{path},first_class=1").names == ("1", "2", "3")


def test_an_unknown_value_names_the_mask(tmp_path: Path) -> None:
    masks = masks_of()
    masks[4][3, 3] = 77
    with pytest.raises(DataError, match=r"m4\.png has the value 77, which is no class"):
        load(write(tmp_path, masks), "classes=[a,b,c]", image_size=14)


def test_another_size_names_both(tmp_path: Path) -> None:
    masks = masks_of()
    masks[3] = masks[3][:, 2:]
    with pytest.raises(DataError, match=r"m3\.png is 14x16, but its image is 16x16"):
        load(write(tmp_path, masks), image_size=14)


@pytest.mark.parametrize(("kind", "match"), [("jpg", "JPEG"), ("rgb", "mode RGB"), ("broken", "not a readable mask")])
def test_files_that_are_no_masks(kind: str, match: str, tmp_path: Path) -> None:
    path = write(tmp_path, masks_of())
    mask = tmp_path / "m2.png"
    if kind == "broken":
        mask.write_bytes(mask.read_bytes()[:40])
    else:
        Image.open(mask).convert("RGB" if kind == "rgb" else "L").save(mask, "jpeg" if kind == "jpg" else "png")
    with pytest.raises(DataError, match=match):
        load(path, image_size=14)


def test_an_image_with_orientation_needs_a_mask_as_it_is_shown(tmp_path: Path) -> None:
    masks = masks_of()
    masks[2] = masks[2][:, 4:]  # 12x16
    path = write(tmp_path, masks)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(digit(2)[:, :]).resize((16, 12)).save(tmp_path / "2.png", exif=exif)
    assert len(load(path, image_size=14).train)


def test_copies_keep_their_masks_and_stay_together(tmp_path: Path) -> None:
    masks = masks_of()
    path = write(tmp_path, masks)
    for i in range(1, 5):
        (tmp_path / f"{i}.png").write_bytes((tmp_path / "0.png").read_bytes())
    dataset = load(path, image_size=14)
    assert "4 copies have another target" in dataset.source
    assert len({part for part in ("train", "test") for row in getattr(dataset, part).rows if row < 5}) == 1
    assert np.array_equal(dataset.train.targets[3], masks[3])


def test_a_missing_mask(tmp_path: Path) -> None:
    path = write(tmp_path, masks_of())
    (tmp_path / "m1.png").unlink()
    with pytest.raises(DataError, match=r"1 file of mask missing: .*m1\.png"):
        load(path, image_size=14)


@pytest.mark.parametrize("suffix", ["npy", "tif"])
def test_masks_of_images_that_pillow_does_not_know(suffix: str, tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    masks = masks_of()
    write(tmp_path, masks)
    rows = [{"image": f"{i}.{suffix}", "mask": f"m{i}.png"} for i in range(COUNT)]
    for i in range(COUNT):
        bands = np.stack([digit(i, 16).astype(np.uint16) * 200] * 5, -1)
        if suffix == "npy":
            np.save(tmp_path / f"{i}.npy", bands)
        else:
            tifffile.imwrite(tmp_path / f"{i}.tif", bands, photometric="minisblack", planarconfig="contig")
    path = write_table(tmp_path / "bands.csv", rows)
    dataset = load(path, "mask=mask,classes=[a,b,c]", image_size=14)
    assert dataset.train.images.shape[-1] == 5
    assert all(np.array_equal(dataset.train.targets[i], masks[i]) for i in range(COUNT))
    Image.fromarray(masks[2][:9, :9]).save(tmp_path / "m2.png")
    with pytest.raises(DataError, match=r"m2\.png is 9x9, but its image is 16x16"):
        load(path, "mask=mask,classes=[a,b,c]", image_size=14)


def gray_png(values: NDArray[np.uint8], bits: int) -> bytes:
    """Return a gray PNG with less than 8 bits a pixel, which Pillow cannot write."""
    height, width = values.shape
    digits = np.unpackbits(values[..., None], axis=2)[..., -bits:].reshape(height, -1)
    lines = b"".join(b"\0" + line.tobytes() for line in np.packbits(digits, axis=1))

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("form", [1, 2, 4, "pgm", "plain pgm"])
def test_gray_masks_of_few_levels_keep_their_values(form: int | str, tmp_path: Path) -> None:
    masks = [np.minimum(mask, 1) if form == 1 else mask for mask in masks_of()]
    path = write(tmp_path, masks)
    for i, mask in enumerate(masks):
        file = tmp_path / f"m{i}.png"
        if isinstance(form, int):
            file.write_bytes(gray_png(mask, form))
        elif form == "pgm":
            file.write_bytes(b"P5 16 16 2\n" + mask.tobytes())
        else:
            file.write_text("P2 16 16 2\n" + " ".join(map(str, mask.reshape(-1))) + "\n")
    dataset = load(path, image_size=14)
    assert dataset.classes == tuple(map(str, range(2 if form == 1 else 3)))
    assert all(np.array_equal(dataset.train.targets[i], masks[i]) for i in range(COUNT))
    if form in {2, "pgm"}:
        with pytest.raises(DataError, match="the value 2, which is no class"):
            load(path, "classes=[a,b]", image_size=14)


def test_copies_stay_together_where_the_table_has_groups(tmp_path: Path) -> None:
    write(tmp_path, masks_of())
    rows = []
    for i in range(COUNT):
        (tmp_path / f"copy{i}.png").write_bytes((tmp_path / f"{i}.png").read_bytes())
        rows += [{"image": f"{name}{i}.png", "mask": f"m{i}.png", "patient": f"{name}{i}"} for name in ("", "copy")]
    dataset = load(write_table(tmp_path / "t.csv", rows), "mask=mask,group=patient", image_size=14)
    images = {
        part: {image.tobytes() for image in getattr(dataset, part).images_at(slice(None))} for part in ("train", "test")
    }
    assert len(images["train"]) + len(images["test"]) == COUNT
    assert not images["train"] & images["test"]
    assert "10 copies of other images, kept in the same split" in dataset.source
