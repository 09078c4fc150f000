"""An adapter on other weights says which it needs; random ones cannot be downloaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import petune
from petune.backbones.create import create_backbone
from petune.base.errors import BackboneMismatch
from tests.trained import NANO, changed, saved_run

BACKBONE: dict[str, Any] = {"name": "vit_nano", "weights": "none"}


def test_random_weights_are_rebuilt_from_the_seed_as_the_message_says(tmp_path: Path) -> None:
    path, att = saved_run(tmp_path / "a", "adaptformer")
    other = create_backbone("vit_nano", weights="none", num_classes=3, options=NANO, seed=1).model
    with pytest.raises(BackboneMismatch, match=r"cannot be downloaded.*seed, 0.* AVX.* save its state_dict") as caught:
        petune.load(other, path)
    (code,) = re.findall(r"petune\.Predictor\(.*\)\.model", str(caught.value))
    rebuilt = eval(code, {"petune": petune})
    x = torch.ones(1, 3, 32, 32)
    assert torch.equal(rebuilt(x), att.model.eval()(x))


@pytest.mark.parametrize(
    ("backbone", "words"),
    [
        (BACKBONE, "cannot be rebuilt, because their seed was not recorded"),
        ({**BACKBONE, "name": "my.models:build"}, r"those that my\.models:build builds"),
        ({"name": "vit_nano", "weights": "vit_tiny.augreg"}, r"vit_tiny\.augreg\. Load those weights first"),
        (None, "the file does not name"),
    ],
)
def test_what_is_recorded_of_other_weights_is_said(backbone: object, words: str, tmp_path: Path) -> None:
    path, _ = saved_run(tmp_path / "a", "adaptformer")
    changed(path, tmp_path / "b", backbone=backbone)
    other = create_backbone("vit_nano", weights="none", num_classes=3, options=NANO, seed=1).model
    with pytest.raises(BackboneMismatch, match=words):
        petune.load(other, tmp_path / "b")
