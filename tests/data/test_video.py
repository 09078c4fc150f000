"""Clips of videos: which frames are read, that they are read right, and what is said about bad files."""

from __future__ import annotations

import itertools
import shutil
import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import petune
from petune.base.errors import ConfigError, DataError, MissingExtra
from petune.data import Preprocess
from petune.data.augment import PRESETS
from petune.data.batches import TrainBatches, eval_batches, num_views
from petune.data.check import check_dataset
from petune.data.folds import fold_of
from petune.data.merge import merge_val
from petune.data.steps import STEP_PRESETS
from petune.data.video.decode import read_frames, read_info
from petune.data.video.sampling import Sampling

pytest.importorskip("av")
from moving_digits import encode

CPU = torch.device("cpu")
LEVELS = 8
"""Gray levels between a frame and the next."""


def write_video(path: Path, frames: int, width: int = 16) -> Path:
    """Encode frames of one gray level each, which tells the number of the frame."""
    path.parent.mkdir(parents=True, exist_ok=True)
    encode(path, np.repeat(np.arange(frames, dtype=np.uint8) * LEVELS, 16 * width * 3).reshape(-1, 16, width, 3))
    return path


def numbers_of(clips: Any) -> list[list[int]]:
    """The numbers of the frames of clips (B, T, H, W, C)."""
    return np.rint(np.asarray(clips)[..., 8, 8, 0] / LEVELS).astype(int).tolist()


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes with train, val and test, of 2 to 24 frames."""
    root = tmp_path_factory.mktemp("videos")
    for part, counts in {"train": (24, 20, 9, 2), "val": (10,), "test": (24, 3)}.items():
        for name in ("down", "up"):
            for number, count in enumerate(counts):
                write_video(root / part / name / f"{number}.mp4", count + (name == "up"))
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PETUNE_CACHE", str(tmp_path / "cache"))


def test_frames_are_in_order_inside_the_video_and_all_of_them_are_stored() -> None:
    generator = np.random.default_rng(0)
    rules = [Sampling("uniform", 8), Sampling("dense", 8, 3), Sampling("uniform", 1), Sampling("dense", 3, 1)]
    for rule in rules:
        for count in (1, 2, 7, 8, 9, 22, 23, 41, 100, 301):
            stored = rule.stored(count, random=True)
            assert len(stored) <= 5 * rule.frames
            drawn = [rule.draw(count, generator) for _ in range(20)]
            for clip in [rule.fixed(count), *drawn]:
                assert len(clip) == rule.frames
                assert (np.diff(clip) >= 0).all()
                assert 0 <= clip.min() <= clip.max() < count
                assert np.isin(clip, stored).all()
            for number in range(3):
                assert np.isin(rule.fixed(count, number, 3), rule.stored(count, random=False, clips=3)).all()
            if count >= 40:
                assert len({tuple(clip) for clip in drawn}) > 1


def test_papers_samplings() -> None:
    uniform, dense = Sampling("uniform", 4), Sampling("dense", 4, 2)
    assert uniform.fixed(12).tolist() == [1, 4, 7, 10]
    assert uniform.fixed(2).tolist() == [0, 0, 1, 1]
    assert dense.fixed(17).tolist() == [5, 7, 9, 11]
    assert dense.fixed(5).tolist() == [0, 2, 4, 4]
    assert [dense.fixed(17, i, 3)[0] for i in range(3)] == [0, 5, 10]
    segments = {int(frame) // 3 for _ in range(50) for frame in uniform.draw(12, np.random.default_rng(0))}
    assert segments == {0, 1, 2, 3}


def test_a_clip_is_a_function_of_seed_epoch_and_index(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = petune.load_dataset(f"video:{videos},frames=4", image_size=14)
    assert data.train.images.shape == (8, 4, 16, 16, 3)
    assert (len(data.train), len(data.val), len(data.test)) == (8, 2, 4)
    assert data.classes == ("down", "up")
    assert data.augment == "crop_only"
    assert numbers_of(data.test.images[data.test.rows[:2]]) == [[3, 9, 15, 21], [0, 0, 1, 2]]
    pre = Preprocess(14, (0.0,) * 3, (1.0,) * 3, 4)

    def epoch(number: int, batch_size: int, split: petune.Split = data.train, seed: int = 0) -> dict[int, torch.Tensor]:
        batches = TrainBatches(split, pre, "shift", batch_size, seed, CPU)
        return {int(i): x for b in batches.epoch(number) for i, x in zip(b.positions, b.x_BCHW, strict=True)}

    first = epoch(0, 8)
    assert all(torch.equal(first[i], x) for i, x in epoch(0, 4).items())
    for other in (epoch(1, 8), epoch(0, 8, seed=1)):
        assert not all(torch.equal(first[i], x) for i, x in other.items())
    monkeypatch.setenv("PETUNE_CACHE", str(tmp_path / "empty"))
    uncached = petune.load_dataset(f"video:{videos},frames=4", image_size=14, cache_gb=0)
    assert "decoded in every epoch" in uncached.source
    assert all(torch.equal(first[i], x) for i, x in epoch(0, 8, uncached.train).items())
    fixed = TrainBatches(data.train, pre, "none", 8, 0, CPU)
    assert torch.equal(next(fixed.epoch(0)).x_BCHW.sort(0)[0], next(fixed.epoch(1)).x_BCHW.sort(0)[0])
    merged = merge_val(data)
    assert len(epoch(0, 10, merged.train)) == 10


@pytest.mark.parametrize(
    "augments",
    [
        [*PRESETS, "crop_only", "color", [{"random_erasing": {"p": 1.0}}, {"rotation": {"degrees": 20}}]],
        pytest.param([*STEP_PRESETS], marks=pytest.mark.exhaustive),
    ],
    ids=["some", "all"],
)
def test_all_frames_of_a_clip_are_augmented_alike(augments: list[Any]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (4, 1, 24, 24, 3), np.uint8).repeat(3, axis=1)
    split = petune.Split.of(noise, np.array([0, 1, 0, 1]))
    assert split.num_frames == 3
    pre = Preprocess(16, (0.5,) * 3, (0.5,) * 3, 3)
    for augment in augments:
        x_BTCHW = next(TrainBatches(split, pre, augment, 4, 0, CPU).epoch(0)).x_BCHW
        assert x_BTCHW.shape == (4, 3, 3, 16, 16)
        torch.testing.assert_close(x_BTCHW[:, 0], x_BTCHW[:, 2])


def test_views_of_tests(videos: Path, tmp_path: Path) -> None:
    frames = np.zeros((6, 16, 48, 3), np.uint8)
    frames[:, :, :16], frames[:, :, 32:] = 60, 200
    for name in ("a", "b"):
        for part in ("train", "test"):
            path = tmp_path / "wide" / part / name / "x.mp4"
            path.parent.mkdir(parents=True)
            encode(path, frames)
    pre = Preprocess(16, (0.0,) * 3, (1 / 255,) * 3, 2)
    for cache_gb in (0, 1):  # stored frames are used with any limit
        data = petune.load_dataset(
            f"video:{tmp_path}/wide,frames=2,test_clips=2,test_crops=3", image_size=16, cache_gb=cache_gb
        )
        batches = list(eval_batches(data.test, pre, 6, CPU))
        assert [(b.x_BCHW.shape[0], b.views, len(b.y_B)) for b in batches] == [(6, 6, 1)] * 2
        means = batches[0].x_BCHW.mean((1, 2, 3, 4))
        assert torch.allclose(means, torch.tensor([60.0, 0, 200] * 2), atol=8)
    (tmp_path / "wide" / "test").rename(tmp_path / "wide" / "val")
    only_val = petune.load_dataset(f"video:{tmp_path}/wide,frames=2,test_clips=2", image_size=16)
    assert num_views(only_val.test) == 2
    cut = petune.load_dataset(f"video:{videos}/train,frames=4,test_clips=2", image_size=14)
    numbers = [numbers_of(cut.test.images.view(cut.test.rows, i)) for i in (0, 1)]  # type: ignore[attr-defined]
    counts = [read_info(Path(name)).frames for name in (cut.test.names.tolist() if cut.test.names is not None else [])]
    rule = Sampling("uniform", 4)
    assert numbers == [[rule.fixed(count, i, 2).tolist() for count in counts] for i in (0, 1)]


def test_a_turned_or_mirrored_video_is_read_upright(tmp_path: Path) -> None:
    frames = np.zeros((2, 32, 48, 3), np.uint8)
    frames[:, :8, :12] = 255
    path = tmp_path / "phone.mp4"
    encode(path, frames)
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 44
    for across, down in itertools.product((-1, 1), repeat=2):
        for turned in (False, True):
            a, b, c, d = (0, across, down, 0) if turned else (across, 0, 0, down)
            values = (a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
            content[matrix : matrix + 36] = struct.pack(">9i", *values)
            path.write_bytes(content)
            info = read_info(path)
            assert (info.width, info.height) == ((32, 48) if turned else (48, 32))
            white = read_frames(path, np.array([0]), 32, (0.5,))[0, 0, :, :, 0]
            center_x, center_y = np.argwhere(white > 200).mean(0)[::-1] - 15.5
            # the white corner is at (-1, -1) from the center of the frame; the matrix says where it is shown
            assert (np.sign(center_x), np.sign(center_y)) == (-a - c, -b - d)


def test_bad_files_are_named(videos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(videos, folder)
    whole = folder / "train" / "up" / "0.mp4"
    (folder / "train" / "up" / "text.mp4").write_text("no video")
    (folder / "test" / "down" / "cut.mp4").write_bytes(whole.read_bytes()[:-500])
    with pytest.raises(DataError, match=r"text\.mp4") as broken:
        petune.load_dataset(f"video:{folder}")
    assert len(broken.value.broken) == 2
    with pytest.raises(DataError, match="may be skipped"):
        petune.load_dataset(f"video:{folder}", on_broken="skip")
    report = check_dataset(f"video:{folder},frames=2", image_size=14)
    assert len(report.broken) == 2
    assert not report.is_sound
    assert report.num_images == {"train": 8, "val": 2, "test": 4}


def test_what_is_no_dataset_of_videos_is_refused_with_what_to_do(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / name / "1.png")
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    cases: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: petune.load_dataset(f"video:{tmp_path}/images"), DataError, "use folder:"),
        (lambda: petune.load_dataset(f"folder:{videos}"), DataError, "use video:"),
        (lambda: petune.load_dataset(f"video:{tmp_path}/empty"), DataError, "no videos"),
        (lambda: petune.load_dataset(f"video:{tmp_path}/nowhere"), DataError, "no such folder"),
        (lambda: petune.load_dataset(f"video:{videos},stride=2"), ConfigError, "sampling=dense"),
        (lambda: petune.load_dataset(f"video:{videos},frames=0"), ConfigError, "frames"),
        (lambda: petune.load_dataset(f"video:{videos}", frames=0), ConfigError, "frames"),
        (lambda: petune.load_dataset(f"video:{videos},test_crops=2"), ConfigError, "test_crops"),
    ]
    for call, error, words in cases:
        with pytest.raises(error, match=words):
            call()
    short = petune.load_dataset(f"video:{videos},frames=8", image_size=14)
    assert "of less than 8 frames" in short.source
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingExtra, match=r"petune\[video\]"):
        petune.load_dataset(f"video:{videos}")


def test_files_that_are_not_read_are_named(videos: Path, tmp_path: Path) -> None:
    for name in ("down", "up"):
        shutil.copytree(videos / "train" / name, tmp_path / "data" / name)
        write_video(tmp_path / "data" / name / "9.m2ts", 9)
        frames = [Image.new("L", (16, 16), number * LEVELS) for number in range(12)]
        file = tmp_path / "data" / name / "8.gif"
        frames[0].save(file, save_all=True, append_images=frames[1:], comment=name)
        frames[0].save(tmp_path / "data" / name / "0.png")
        for other in ("0.txt", "0.dav", "film"):
            (tmp_path / "data" / name / other).write_text("")
    data = petune.load_dataset(f"video:{tmp_path}/data,frames=4", image_size=14)
    assert len(data.train) + len(data.test) == 12
    assert "6 files left out, not read as videos: 2 without a suffix, 2 .dav, 2 .png" in data.source
    assert np.rint(read_frames(file, np.array([0, 7, 11]), 16)[0, :, 8, 8, 0] / LEVELS).tolist() == [0, 7, 11]
    images = petune.load_dataset(f"folder:{tmp_path}/data", image_size=14)
    assert "14 files left out, not read as images: 8 .mp4, 2 without a suffix, 2 .dav, 2 .m2ts" in images.source
    rows = [f"data/{name}/{file},{name}" for name in ("down", "up") for file in ("0.mp4", "1.mp4", "8.gif")]
    (tmp_path / "clips.csv").write_text("\n".join(["file,label", *rows]))
    table = petune.load_dataset(f"table:{tmp_path}/clips.csv,frames=2", image_size=14)
    assert "6 videos next to those of the table not listed in it" in table.source
    stills = [f"data/{name}/7.gif,{name}" for name in ("down", "up")]
    for name in ("down", "up"):
        frames[0].save(tmp_path / "data" / name / "7.gif")
    (tmp_path / "clips.csv").write_text("\n".join(["file,label", rows[2], rows[5], *stills]))
    for options, frames_of_clip in (("", None), (",frames=2", 2)):
        table = petune.load_dataset(f"table:{tmp_path}/clips.csv{options}", image_size=14)
        assert table.train.num_frames == frames_of_clip


def test_masks_of_clips_are_refused(videos: Path) -> None:
    data = petune.load_dataset(f"video:{videos},frames=2", image_size=14)
    masks = np.zeros((8, 16, 16), np.uint8)
    with pytest.raises(DataError, match="clips with masks"):
        replace(data, train=replace(data.train, targets=masks)).validated()


def test_a_table_of_videos(videos: Path, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    table = tmp_path / "clips.csv"
    files = sorted((videos / "train").rglob("*.mp4"))
    lines = [f"{path},{path.parent.name},{len(path.name)}.5" for path in files]
    table.write_text("\n".join(["video,label,speed", *lines]))
    data = petune.load_dataset(f"table:{table},frames=4,test_clips=3", image_size=14)
    assert data.augment == "crop_only"
    assert data.train.num_frames == 4
    assert data.test.names is not None
    assert len(data.test) == 2
    counts = [read_info(Path(name)).frames for name in data.test.names.tolist()]
    rule = Sampling("uniform", 4)
    assert numbers_of(data.test.images[data.test.rows]) == [rule.fixed(count, 0, 3).tolist() for count in counts]
    numbers = petune.load_dataset(f"table:{table},target=speed,sampling=dense,stride=1", image_size=14, frames=2)
    assert (numbers.target.kind, numbers.train.num_frames) == ("number", 2)
    (tmp_path / "broken.mp4").write_text("no video")
    table.write_text("\n".join(["video,label", *(f"{path},{path.parent.name}" for path in files), "broken.mp4,up"]))
    with pytest.raises(DataError, match="broken"):
        petune.load_dataset(f"table:{table}", on_broken="skip")
    report = check_dataset(f"table:{table},frames=2", image_size=14)
    assert report.num_images["train"] + report.num_images["test"] == len(files)
    assert report.sample == "video"
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    for last, options, words in (("1.png,up", "", "videos and images"), ("", ",mask=label", "mask")):
        table.write_text("\n".join(["video,label", *(f"{path},{path.parent.name}" for path in files), last]))
        with pytest.raises(DataError, match=words):
            petune.load_dataset(f"table:{table}{options}")
    contents = pa.table({"video": [file.read_bytes() for file in files], "label": ["a", "b"] * 4})
    pq.write_table(contents, tmp_path / "bytes.parquet")
    with pytest.raises(DataError, match="bytes of videos"):
        petune.load_dataset(f"table:{tmp_path}/bytes.parquet")
    table.write_text("image,label\n1.png,up\n")
    with pytest.raises(DataError, match="frames is for videos"):
        petune.load_dataset(f"table:{table},frames=2")


def test_folds_keep_the_clips_and_crops_of_tests(videos: Path) -> None:
    for cache_gb in (0, 1):  # stored frames are used with any limit
        whole = petune.load_dataset(f"video:{videos}/train,frames=4,test_clips=2", image_size=14, cache_gb=cache_gb)
        rule, seen = Sampling("uniform", 4), []
        for fold in (1, 2):
            data = fold_of(whole, 2, fold)
            assert data.test.names is not None
            names = data.test.names.tolist()
            counts = [read_info(Path(name)).frames for name in names]
            shown = numbers_of(data.test.images.view(data.test.rows, 1))  # type: ignore[attr-defined]
            assert shown == [rule.fixed(count, 1, 2).tolist() for count in counts]
            seen += names
        assert len({*seen}) == len(seen) == 8
    own = petune.load_dataset(f"video:{videos},frames=4,test_clips=2", image_size=14)
    with pytest.raises(ConfigError, match="test_clips"):
        fold_of(own, 2, 1)
