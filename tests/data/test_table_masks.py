"""Masks of a table: palette and gray files, unknown values, other sizes, ignored pixels, the first class."""

from __future__ import annotations

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
