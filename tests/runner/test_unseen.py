"""A run that continues another one neither chooses the epoch nor tests on images that it trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import petune
from petune.base.errors import ConfigError
from petune.data import load_dataset
from petune.data.folds import fold_of
from petune.runner.run_config import RunConfig
from petune.runner.run_data import prepare_data
from tests.data.tables import write_images, write_table

TINY: dict[str, Any] = {
    "method": "adaptformer:bottleneck=4", "backbone": "vit_nano", "weights": "none", "image_size": 8, "device": "cpu",
    "backbone_options": {"depth": 1, "embed_dim": 24, "num_heads": 2},
}  # fmt: skip
TRAIN: dict[str, Any] = {"epochs": 1, "batch_size": 20, "precision": "fp32", "lr": 0.01}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a table of 36 images of two classes, in 12 groups."""
    folder = tmp_path_factory.mktemp("table")
    rows = [{"file": name, "label": "ab"[i % 2], "who": i // 3} for i, name in enumerate(write_images(folder, 36))]
    return str(write_table(folder / "t.csv", rows))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"folds": 3, "fold": 1}, {"folds": 3, "fold": 2}),
        ({}, {"folds": 3, "fold": 1}),
        ({}, {"options": ",group=who"}),
        ({"final_fit": "train+val"}, {}),
    ],
)
def test_other_splits_of_the_same_images_are_refused(
    first: dict[str, Any], second: dict[str, Any], table: str, tmp_path: Path
) -> None:
    petune.run(**TINY, dataset=table, train=TRAIN, output=tmp_path / "first", **first)
    dataset = table + second.pop("options", "")
    with pytest.raises(ConfigError, match="trained on"):
        petune.run(from_run=tmp_path / "first", dataset=dataset, train=TRAIN, output=tmp_path / "second", **second)


def test_images_of_a_run_two_steps_before_are_refused(table: str, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    train = {**TRAIN, "batch_size": 500}
    petune.run(**TINY, dataset="digits", folds=3, fold=1, train=train, output=first)
    petune.run(from_run=first, dataset=table, train=TRAIN, output=second)
    with pytest.raises(ConfigError, match="first/adapter trained on"):
        petune.run(from_run=second, dataset="digits", folds=3, fold=2, train=train, output=tmp_path / "third")
    petune.run(from_run=second, dataset="digits", folds=3, fold=1, train=train, output=tmp_path / "third")


def test_a_fold_is_continued_with_its_images(table: str, tmp_path: Path) -> None:
    petune.run(**TINY, dataset=table, train=TRAIN, output=tmp_path / "first", folds=3, fold=2)
    petune.run(from_run=tmp_path / "first", train=TRAIN, output=tmp_path / "second")
    configs = [yaml.safe_load((tmp_path / run / "config.yaml").read_text()) for run in ("first", "second")]
    names = [prepare_data(RunConfig.build(config)).test.names for config in configs]
    assert np.array_equal(*names)  # type: ignore[arg-type]


def test_folds_leave_a_test_split_of_the_table_alone(tmp_path: Path) -> None:
    rows = [
        {"file": name, "label": "ab"[i % 2], "split": "train" if i < 24 else "test"}
        for i, name in enumerate(write_images(tmp_path, 36))
    ]
    dataset = load_dataset(str(write_table(tmp_path / "t.csv", rows)), image_size=8)
    fold = fold_of(dataset, 3, 1)
    assert not {*fold.train.names, *fold.test.names} & {*dataset.test.names}  # type: ignore[misc]
