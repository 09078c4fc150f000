"""Options that cannot work are refused before a model is built, and leave no directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import petune
from petune.base.errors import ConfigError

TINY: dict[str, Any] = {
    "backbone": "vit_nano", "weights": "none", "backbone_options": {"depth": 2, "embed_dim": 24, "num_heads": 2},
    "image_size": 8, "dataset": "digits", "device": "cpu",
}  # fmt: skip


def test_options_that_cannot_work_are_refused_before_a_model_is_built(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"method": "linear"}, {"layer_decay": 0.7}, "linear trains nothing in the blocks"),
        ({"method": "linear"}, {"mixup": 0.5, "batch_size": 15}, "even batch size, but it is 15"),
        ({"method": "bitfit", "head": "bn_linear"}, {"batch_size": 1}, "at least two images"),
        ({"method": "bitfit", "head": "bn_linear"}, {"micro_batch_size": 1}, "at least two images"),
    ]
    notes: list[str] = []
    for values, train, problem in cases:
        with pytest.raises(ConfigError, match=problem):
            petune.run(
                **TINY, **values, train={"epochs": 1, **train}, output=tmp_path / "new" / "run",
                watch=lambda event: notes.append(str(event)),
            )  # fmt: skip
        assert not (tmp_path / "new").exists()
    assert not any("weights" in note for note in notes)  # the note on the backbone comes when it is built


@pytest.mark.parametrize(
    ("backbone", "field", "key"),
    [
        ("vit_nano", "image_size", "img_size"),
        ("vit_nano", "patch_size", "patch_size"),
        ("torchvision:vit_b_16", "image_size", "image_size"),
        ("my.module:factory", "image_size", "image_size"),
    ],
)
def test_two_values_of_a_size_are_refused(backbone: str, field: str, key: str) -> None:
    values = {"backbone": backbone, field: 32}
    with pytest.raises(ConfigError, match=rf"{field} is 32, but backbone_options\.{key} is 64"):
        petune.RunConfig.build({**values, "backbone_options": {key: 64}}, "a test")
    same = petune.RunConfig.build({**values, "backbone_options": {key: 32, "depth": 2}}, "a test")
    assert same.backbone_options == {key: 32, "depth": 2}


@pytest.mark.parametrize("value", [torch.nn.GELU, np.int64(2), torch.float16])
def test_options_of_a_backbone_that_no_file_can_store_are_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"act is of the type {type(value).__name__}"):
        petune.RunConfig(backbone_options={"depth": 2, "act": value})


def test_an_option_without_effect_is_refused() -> None:
    for task, option in (
        ("classification:class_weights=inverse,beta=0.9", "beta"),
        ("classification:beta=0.9", "beta"),
        ("classification:class_weights={a: 2},beta=0.9", "beta"),
        ("multi_label:gamma_neg=2", "gamma_neg"),
        ("multi_label:loss=zlpr,pos_weight=2", "pos_weight"),
        ("regression:delta=2", "delta"),
    ):
        with pytest.raises(ConfigError, match=option):
            petune.check_task(task)
    assert petune.check_task("classification:class_weights=effective,beta=0.9")


def test_a_refused_cross_validation_comparison_or_sweep_leaves_no_directory(tmp_path: Path) -> None:
    run = {**TINY, "method": "linear", "shots": 5, "train": {"epochs": 1, "mixup": 0.5, "batch_size": 15}}
    folds = {**run, "folds": 3, "shots": None}
    with pytest.raises(ConfigError):
        petune.cross_validate(**folds, output=tmp_path / "a" / "folds")
    assert [*tmp_path.iterdir()] == []
