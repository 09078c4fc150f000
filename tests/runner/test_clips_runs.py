"""Runs on clips, with video models and image models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers

import petune
from petune.base.errors import ConfigError
from petune.runner.preview import preview_backbone
from petune.runner.run_data import check_clips

pytest.importorskip("av")
from moving_digits import encode


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of noise, dark and bright."""
    root = tmp_path_factory.mktemp("videos")
    generator = np.random.default_rng(0)
    for part in ("train", "val", "test"):
        for number, name in enumerate(("bright", "dark") * 4):
            frames = generator.integers(0, 100, (4, 16, 16, 3)) + (100 if name == "bright" else 0)
            path = root / part / name / f"{number}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            encode(path, frames.astype(np.uint8))
    return root


@pytest.fixture(scope="module")
def videomae(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("videomae")
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    transformers.VideoMAEConfig(image_size=16, patch_size=8, num_frames=4, **shape).save_pretrained(directory)
    return f"hf:{directory}"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PETUNE_CACHE", str(tmp_path / "cache"))


def test_a_video_model_trains_and_is_restored(videos: Path, videomae: str, tmp_path: Path) -> None:
    run: dict[str, Any] = {"backbone": videomae, "weights": "none", "dataset": f"video:{videos}", "device": "cpu"}
    train = {"epochs": 1, "batch_size": 4}
    result = petune.run(**run, method="adaptformer:bottleneck=2", recipe="video", train=train, output=tmp_path / "run")
    assert petune.evaluate(tmp_path / "run").top1 == result.top1
    predictor = petune.Predictor(tmp_path / "run")
    assert predictor.metadata["backbone"]["num_frames"] == 4
    assert predictor.metadata["method"] == "adaptformer:bottleneck=2,dropout=0.0"
    assert predictor.logits(torch.zeros(2, 4, 3, 16, 16)).shape == (2, 2)
    preview = preview_backbone(petune.RunConfig(**run | {"dataset": f"video:{videos},frames=2"}))
    assert preview.sites.input_size == (2, 3, 16, 16)
    assert preview.sample == "clip"


def test_an_image_model_says_that_it_sees_frames_one_by_one(videos: Path, tmp_path: Path) -> None:
    shape = {"depth": 1, "embed_dim": 24, "num_heads": 2, "img_size": 16}
    notes: list[str] = []
    petune.run(
        method="linear",
        backbone="vit_nano",
        weights="none",
        backbone_options=shape,
        dataset=f"video:{videos},frames=2",
        device="cpu",
        train={"epochs": 1},
        output=tmp_path / "run",
        watch=lambda event: notes.append(event.text) if isinstance(event, petune.Note) else None,
    )
    assert any("2 frames of a clip one by one" in note for note in notes)
    logits = petune.Predictor(tmp_path / "run").logits(torch.ones(1, 2, 3, 16, 16))
    model = timm.create_model("vit_tiny_patch16_224", patch_size=4, num_classes=2, **shape)
    with pytest.raises(petune.BackboneMismatch):  # these are other random weights
        petune.load(petune.take_clips(model, 2), tmp_path / "run" / "adapter")
    assert logits.shape == (1, 2)


def test_a_video_model_is_not_trained_on_images(videomae: str) -> None:
    with pytest.raises(ConfigError, match=r"takes clips of 4 frames, but digits has images"):
        check_clips(petune.RunConfig(backbone=videomae, weights="none", dataset="digits"))


def test_a_folder_of_videos_that_is_read_as_images_is_named(videos: Path, videomae: str) -> None:
    with pytest.raises(petune.DataError, match=rf"8 videos: use video:{videos}"):
        check_clips(petune.RunConfig(backbone=videomae, weights="none", dataset=f"folder:{videos / 'train'}"))
    with pytest.raises(petune.DataError, match="no such folder"):
        check_clips(petune.RunConfig(backbone=videomae, weights="none", dataset=f"folder:{videos / 'missing'}"))
