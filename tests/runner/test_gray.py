"""A backbone with one input channel trains on gray images, and predicts and exports as it was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import petune
from petune.base.errors import ConfigError
from petune.data.preprocess import Preprocess, to_gray
from petune.runner.preview import preview_backbone
from petune.runner.run_config import RunConfig

TINY: dict[str, Any] = {
    "method": "adaptformer:bottleneck=4", "backbone": "vit_nano", "weights": "none", "dataset": "digits", "shots": 5,
    "device": "cpu", "train": {"epochs": 1, "batch_size": 10, "precision": "fp32"},
}  # fmt: skip


def _options(channels: int) -> dict[str, Any]:
    return {"depth": 1, "embed_dim": 24, "num_heads": 2, "in_chans": channels}


def test_gray_is_the_luma_of_pillow() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    gray = to_gray(torch.from_numpy(pixels).permute(2, 0, 1)[None].float())[0, 0]
    expected = np.asarray(Image.fromarray(pixels).convert("L"), np.float32)
    assert np.abs(gray.numpy() - expected).max() < 1


def test_one_channel_is_normalized_by_one_mean() -> None:
    x = torch.full((2, 3, 4, 4), 102.0)
    assert Preprocess(4, (0.5,), (0.25,)).normalize(x).shape == (2, 1, 4, 4)
    torch.testing.assert_close(Preprocess(4, (0.5,), (0.25,)).normalize(x), torch.full((2, 1, 4, 4), -0.4))


def test_a_run_predicts_and_exports_with_one_channel(tmp_path: Path) -> None:
    done = petune.run(**TINY, backbone_options=_options(1), output=tmp_path / "run")
    predictor = petune.Predictor(tmp_path / "run")
    assert len(predictor.transform.preprocess.mean) == 1
    assert petune.evaluate(tmp_path / "run").top1 == pytest.approx(done.top1)
    (prediction,) = predictor([np.zeros((8, 8, 3), np.uint8)])
    assert prediction.error == ""
    petune.export(tmp_path / "run", tmp_path / "run.pt2")
    assert (tmp_path / "run.pt2").exists()


def test_statistics_of_pretrained_weights_become_those_of_gray(tmp_path: Path) -> None:
    options = _options(1) | {"depth": 1}
    petune.pretrain(
        backbone="vit_nano", dataset="digits", shots=5, device="cpu", backbone_options=options, output=tmp_path / "pre",
        mean=(0.2, 0.3, 0.4), std=(0.5, 0.5, 0.5), train={"epochs": 1, "batch_size": 10},
    )  # fmt: skip
    run = {**TINY, "weights": str(tmp_path / "pre")}
    petune.run(**run, backbone_options=options, output=tmp_path / "run")
    preprocess = petune.Predictor(tmp_path / "run").transform.preprocess
    assert preprocess.mean == pytest.approx((0.2 * 0.299 + 0.3 * 0.587 + 0.4 * 0.114,))
    assert preprocess.std == pytest.approx((0.5,))


def test_another_number_of_channels_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="images of 4 channels"):
        petune.run(**TINY, backbone_options=_options(4), output=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="images of 4 channels"):
        preview_backbone(RunConfig(backbone="vit_nano", dataset="digits", backbone_options={"in_chans": 4}))
