"""Videos are read for a trained model as its tests read them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import petune
from petune.base.errors import DataError
from petune.data.batches import eval_batches
from petune.data.video.clips import Views
from petune.data.video.sampling import Sampling
from petune.serving.image_transform import ImageTransform

pytest.importorskip("av")
from moving_digits import Form, encode, make_clips

METADATA = {
    "preprocess": {
        "image_size": 28, "mean": [0.1] * 3, "std": [0.5] * 3, "stored_size": 32, "crop": 0.875, "channels": 3,
        "dtype": "uint8", "clip": {"kind": "dense", "frames": 4, "stride": 2},
    }
}  # fmt: skip


def test_files_give_the_pixels_of_the_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PETUNE_CACHE", str(tmp_path / "cache"))
    make_clips(tmp_path / "digits", {"train": 8, "test": 8}, Form(side=40, frames=9))
    transform = ImageTransform.from_metadata(METADATA)
    assert transform.sampling == Sampling("dense", 4, 2)
    options = "frames=4,sampling=dense,stride=2"
    for views in (Views(), Views(2, 3)):
        name = f"video:{tmp_path}/digits,{options},test_clips={views.clips},test_crops={views.crops}"
        test = petune.load_dataset(name, image_size=28).test
        (batch,) = eval_batches(test, transform.preprocess, 100, torch.device("cpu"))
        seen = transform if len(views) == 1 else transform.with_views(views)
        assert test.names is not None
        squares, errors = seen.squares([Path(name) for name in test.names.tolist()])
        assert not errors
        assert torch.equal(seen.batch(squares, torch.device("cpu")), batch.x_BCHW)


def test_clips_and_crops_of_the_run_are_those_of_predictions(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (9, 40, 48, 3), np.uint8)
    one = ImageTransform.from_metadata(METADATA)
    preprocess = {**METADATA["preprocess"], "views": {"clips": 2, "crops": 3}}
    transform = ImageTransform.from_metadata({"preprocess": preprocess})
    assert transform == one.with_views(Views(2, 3))
    clips, errors = transform.squares([frames, frames[:0]])
    assert clips.shape == (2 * 6, 4, 28, 28, 3)
    assert list(errors) == [1]
    encode(tmp_path / "frames.mp4", frames)
    assert np.abs(clips[:6].astype(int) - transform.squares([tmp_path / "frames.mp4"])[0]).mean() < 40
    assert transform.with_views(Views()) == one


def test_what_is_no_video_is_reported_and_the_others_are_read(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (6, 40, 48, 3), np.uint8)
    encode(tmp_path / "good.mp4", frames)
    (tmp_path / "bad.mp4").write_text("no video")
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    transform = ImageTransform.from_metadata(METADATA)
    sources = [
        tmp_path / "good.mp4", tmp_path / "bad.mp4", tmp_path / "image.png", tmp_path / "gone.mp4", frames,
        frames[0], frames[..., :2], Image.new("RGB", (8, 8)), DataError("nothing here"), frames[:0],
        frames[:, :0, :0],
    ]  # fmt: skip
    clips, errors = transform.squares(sources)
    assert clips.shape == (11, 4, 32, 32, 3)
    assert list(errors) == [1, 2, 3, 5, 6, 7, 8, 9, 10]
    assert "takes videos" in errors[2]
    assert "no pixels" in errors[10]
    assert "no such file" in errors[3]
    assert np.abs(clips[0].astype(int) - clips[4]).mean() < 40  # one was compressed
    assert replace(transform, sampling=None).squares([tmp_path / "good.mp4"])[1] == {
        0: f"{tmp_path / 'good.mp4'}: not a readable image (a video)"
    }
