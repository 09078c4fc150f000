"""Near-duplicates: planted ones are found, different photos are not; every kind of target is counted."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_images

from petune.data import Dataset, Split, Target, load_dataset
from petune.data.check import check_dataset
from petune.data.check.near_duplicates import Hashes, find_twins
from petune.data.check.parts import dataset_parts
from petune.data.dataset import TargetKind

REAL = Path(os.environ.get("PETUNE_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")


def _photos() -> list[Image.Image]:
    """Return different parts of two photos, without those of plain sky."""
    parts = []
    for photo in load_sample_images().images:
        image = Image.fromarray(photo)
        parts += [image.crop((x, y, x + 90, y + 90)) for x in range(0, 540, 90) for y in range(0, 337, 56)]
    return [part for part in parts if np.asarray(part.convert("L")).std() > 20]


def _hashes(images: list[Image.Image]) -> Hashes:
    gray = [np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BICUBIC)) for image in images]
    return Hashes.of(np.stack(gray))


def _jpeg(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=30)
    return Image.open(buffer)


@pytest.mark.parametrize(
    ("change", "is_mirrored"),
    [
        (_jpeg, False),
        (lambda image: image.resize((40, 40)), False),
        (lambda image: image.resize((300, 300)), False),
        (lambda image: ImageEnhance.Brightness(image).enhance(0.7), False),
        (lambda image: ImageEnhance.Contrast(image).enhance(0.8), False),
        (ImageOps.grayscale, False),
        (ImageOps.mirror, True),
        (lambda image: _jpeg(ImageOps.mirror(image)), True),
    ],
)
def test_changed_copies_are_found(change: Callable[[Image.Image], Image.Image], is_mirrored: bool) -> None:
    photos = _photos()
    twins = find_twins(_hashes([change(photo) for photo in photos]), _hashes(photos))
    found = twins.reference_Q == torch.arange(len(photos))
    assert found.float().mean() >= 0.97
    assert (twins.mirrored_Q[found] == is_mirrored).float().mean() >= 0.95


def test_different_photos_are_not_near_duplicates() -> None:
    photos = _photos()
    assert find_twins(_hashes(photos)).num_pairs == 0
    turned = [photo.rotate(90) for photo in photos]
    assert find_twins(_hashes(turned), _hashes(photos)).num_pairs == 0


def test_images_without_contrast_are_compared_exactly_only() -> None:
    flat = np.full((4, 32, 32), 77, np.uint8)
    flat[1:] += np.random.default_rng(0).integers(0, 2, (3, 32, 32), np.uint8)
    assert find_twins(Hashes.of(flat)).num_pairs == 0


def test_images_of_one_kind_are_no_near_duplicates() -> None:
    rng = np.random.default_rng(0)
    radius = np.hypot(*np.mgrid[-1:1:32j, -1:1:32j])
    patterns = [Image.fromarray(rng.normal(0, 12, (14, 14)).astype(np.float32)).resize((32, 32)) for _ in range(40)]
    bodies = [np.clip(20 + 200 * (radius < 0.7) + np.asarray(p), 0, 255).astype(np.uint8) for p in patterns]
    gray = np.stack([*bodies, np.asarray(_jpeg(Image.fromarray(bodies[7])))])
    twins = find_twins(Hashes.of(gray))
    assert torch.nonzero(twins.similarity_Q).flatten().tolist() == [40]
    assert twins.reference_Q[40] == 7
    like = Hashes.of(gray).low
    assert (like.even_NF @ like.even_NF.T + (like.odd_NF @ like.odd_NF.T).abs()).min() > 0.95


@pytest.mark.exhaustive
@pytest.mark.skipif(not (REAL / "fashion_mnist" / "test.parquet").exists(), reason="it is not in PETUNE_DATA")
def test_similar_garments_are_not_taken_for_copies() -> None:
    (leak,) = [
        pair
        for pair in check_dataset(f"hf:{REAL / 'fashion_mnist'}", image_size=28).near_duplicates
        if pair.split != pair.other
    ]
    assert leak.num_images < 150  # of 5,000; 1,796 have a like hash


def test_pairs_are_the_same_in_blocks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    photos = _photos()
    hashes = _hashes(photos[:30] + [_jpeg(photo) for photo in photos[10:40]] + photos[:5])
    whole = find_twins(hashes)
    monkeypatch.setattr("petune.data.check.near_duplicates.QUERY_BLOCK", 7)
    monkeypatch.setattr("petune.data.check.near_duplicates.REFERENCE_BLOCK", 11)
    parts = find_twins(hashes)
    assert whole.num_pairs == parts.num_pairs == 25
    assert torch.equal(whole.reference_Q, parts.reference_Q)


@pytest.mark.exhaustive
@pytest.mark.skipif(not (REAL / "cifar10" / "test.parquet").exists(), reason="CIFAR is not in PETUNE_DATA")
@pytest.mark.slow
def test_the_duplicates_of_real_photos_are_few() -> None:
    data = load_dataset("cifar10", REAL)
    gray = dataset_parts(data)["test"].images.gray_NSS
    assert find_twins(Hashes.of(gray)).num_pairs == 17  # of 50 million; looked at, each is the same photo


def _dataset(kind: TargetKind, names: tuple[str, ...], targets: NDArray[np.generic]) -> Dataset:
    images = np.random.default_rng(0).integers(0, 256, (len(targets), 16, 16, 3), np.uint8)
    split = Split.of(images, targets)
    half = len(targets) // 2
    train, test = split.take(np.arange(half)), split.take(np.arange(half, len(targets)))
    return Dataset("made", Target(kind, names), "memory", "none", train, split.take(np.arange(0)), test)


@pytest.mark.parametrize(
    ("kind", "targets", "counts"),
    [
        ("class", np.array([0, 1, 1, 1]), {"a": 1, "b": 1}),
        ("multi_hot", np.array([[1, 1], [0, 1], [0, 0], [1, 0]], np.uint8), {"a": 1, "b": 2}),
        ("mask", np.tile(np.array([0, 1, 0, 0], np.uint8)[:, None, None], (1, 16, 16)), {"a": 1, "b": 1}),
    ],
)
def test_images_are_counted_by_class(kind: TargetKind, targets: NDArray[np.generic], counts: dict[str, int]) -> None:
    assert dataset_parts(_dataset(kind, ("a", "b"), targets))["train"].counts == counts


def test_numbers_are_counted_in_the_same_intervals_in_all_splits() -> None:
    parts = dataset_parts(_dataset("number", ("age",), np.array([[0.0], [1], [2], [10]])))
    assert list(parts["train"].counts) == list(parts["test"].counts)
    assert parts["train"].counts["age 0 to 1"] == 1
    assert parts["test"].counts["age 9 to 10"] == 1


def test_images_of_many_channels_and_bits_are_checked() -> None:
    data = _dataset("class", ("a", "b"), np.array([0, 1, 0, 1]))
    images = np.random.default_rng(0).integers(0, 60000, (4, 16, 16, 12)).astype(np.uint16)
    split = Split.of(images, data.train.targets)
    part = dataset_parts(Dataset("made", data.target, "memory", "none", split, split.take(np.arange(0)), split))[
        "train"
    ]
    assert part.images.gray_NSS.std() > 0
    assert part.images.sizes_N2.tolist() == [[16, 16]] * 4 or len(part.names) == 2


def test_a_folder_whose_class_is_broken_is_checked_to_the_end(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(3):
            (tmp_path / name / f"{i}.jpg").write_bytes(b"no image")
    report = check_dataset(f"folder:{tmp_path}")
    assert len(report.broken) == 6
    assert (report.sizes, report.near_duplicates) == (None, [])


@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_images_of_float_bands_are_sound(dtype: str, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for name in ("dry", "wet"):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.fromarray((generator.random((16, 16)) * 1000).astype(dtype)).save(tmp_path / name / f"{i}.tif")
    report = check_dataset(f"folder:{tmp_path}", image_size=16)
    assert (report.broken, report.is_sound) == ([], True)
