"""Sweeps whose best values train on train and val in the end (final_fit=only), and what cannot work there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import petune
from petune.base.errors import ConfigError

TINY: dict[str, Any] = {
    "method": "linear", "backbone": "vit_nano", "weights": "none", "image_size": 8, "dataset": "digits",
    "backbone_options": {"depth": 1, "embed_dim": 24, "num_heads": 2}, "device": "cpu",
}  # fmt: skip
TRAIN: dict[str, Any] = {"epochs": 2, "batch_size": 4000, "precision": "fp32"}
"""One batch an epoch, with val or without, so that a checkpoint of a trial would be accepted."""


def test_the_best_values_train_on_train_and_val_from_the_start(tmp_path: Path) -> None:
    run = {**TINY, "final_fit": "only", "train": TRAIN}
    search = {"train.lr": (1e-3, 1e-2)}
    swept = petune.sweep(search=search, run=run, output=tmp_path / "sweep")
    assert [(row.state, row.epoch) for row in swept.rows] == [("done", 2), ("done", 2)]
    assert all(row.val_metrics for row in swept.rows)
    train = {**TRAIN, "lr": swept.params["train.lr"]}
    alone = petune.run(**{**run, "train": train}, output=tmp_path / "alone")
    assert swept.result is not None
    assert (swept.result.metrics, swept.result.num_images) == (alone.metrics, alone.num_images)
    assert (swept.result.val_metrics, swept.result.provenance["final_fit"]) == (None, "only")
    tensors = [
        (directory / "adapter" / "adapter_model.safetensors").read_bytes()
        for directory in (Path(swept.result.output), tmp_path / "alone")
    ]
    assert tensors[0] == tensors[1]
    trial = json.loads((tmp_path / "sweep" / f"trial-{swept.best:03d}" / "trial.json").read_text())
    assert trial["val_metrics"] == swept.rows[swept.best or 0].val_metrics
    assert petune.sweep(search=search, run=run, output=tmp_path / "sweep") == swept


@pytest.mark.parametrize(
    ("options", "search", "problem"),
    [
        ({"final_fit": "train+val", "shots": 5}, {"train.lr": (1e-3, 1e-2)}, "shots"),
        ({"final_fit": "only", "train": {**TRAIN, "patience": 1}}, {"train.lr": (1e-3, 1e-2)}, "patience"),
        ({"final_fit": "only"}, {"train.patience": (None, 2)}, "patience"),
    ],
)
def test_what_the_test_would_refuse_is_refused_before_the_first_trial(
    options: dict[str, Any], search: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    run = {**TINY, "train": TRAIN, **options}
    with pytest.raises(ConfigError, match=problem):
        petune.sweep(search=search, run=run, output=tmp_path / "sweep")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("directory", ["compare", "grid", "folds"])
def test_so_do_a_comparison_a_grid_and_a_cross_validation(directory: str, tmp_path: Path) -> None:
    run = {**TINY, "final_fit": "only", "train": {**TRAIN, "patience": 1}}
    output = tmp_path / directory
    calls: dict[str, Callable[[], Any]] = {
        "folds": lambda: petune.cross_validate(**run, folds=2, output=output),
        "grid": lambda: petune.compare_datasets(methods=("linear",), datasets=("digits",), run=run, output=output),
        "compare": lambda: petune.compare(methods=("linear",), run=run, output=output),
    }
    with pytest.raises(ConfigError, match="patience"):
        calls[directory]()
    assert [*tmp_path.iterdir()] == []
