"""Test and val images of averages and of adapters that lie elsewhere: those of the run, or it is said what is known."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import petune
from petune.runner.kept_splits import file_digests, read_splits
from petune.serving.evaluation import EvalRequest, select_images
from tests.trained import changed

TINY: dict[str, Any] = {
    "method": "linear", "backbone": "vit_nano", "image_size": 16, "device": "cpu",
    "train": {"epochs": 1, "batch_size": 8, "precision": "fp32"},
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs on one folder of images, which has train alone. Read them, do not write to them."""
    place = tmp_path_factory.mktemp("runs")
    generator = np.random.default_rng(0)
    for number in range(36):
        file = place / "images" / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(file)
    options: dict[str, dict[str, Any]] = {
        "fold1": {"folds": 3, "fold": 1}, "fold2": {"folds": 3, "fold": 2},
        "small": {"val_fraction": 0.2}, "large": {"val_fraction": 0.4, "train": {**TINY["train"], "lr": 0.01}},
    }  # fmt: skip
    for name, own in options.items():
        petune.run(**{**TINY, **own}, dataset=f"folder:{place / 'images'}", output=place / name)
    return place


def evaluated(path: Path, split: Any = "test") -> tuple[set[str], int | None]:
    """Return the digests of the images that are read, and the number of them that is said to be trained on."""
    images = select_images(petune.Predictor(path, device="cpu"), EvalRequest(path, split, None, None, 8))
    return {*file_digests(list(images.names))}, images.num_trained_on


def test_the_adapter_of_a_fold_has_its_test_images_anywhere(runs: Path, tmp_path: Path) -> None:
    record = read_splits(runs / "fold2")
    assert record is not None
    shutil.copytree(runs / "fold2" / "adapter", tmp_path / "alone")
    petune.convert(adapter_of_lora(runs, tmp_path), tmp_path / "converted")
    assert evaluated(runs / "fold2") == (record.test, 0)
    assert evaluated(tmp_path / "alone") == (record.test, 0)
    assert evaluated(tmp_path / "alone", "val") == (record.val, 0)
    assert evaluated(tmp_path / "converted") == (record.test, 0)


def adapter_of_lora(runs: Path, tmp_path: Path) -> Path:
    dataset = f"folder:{runs / 'images'}"
    petune.run(**{**TINY, "method": "lora:r=2"}, dataset=dataset, folds=3, fold=2, output=tmp_path / "lora")
    return tmp_path / "lora"


def test_folds_have_no_test_images_in_common(runs: Path, tmp_path: Path) -> None:
    petune.average_adapters([runs / "fold1", runs / "fold2"], tmp_path / "soup")
    with pytest.raises(petune.UsageError, match=r"soup averages had other folds.*dataset='folder:PATH'"):
        petune.evaluate(tmp_path / "soup", device="cpu")


@pytest.mark.parametrize(("first", "second"), [("fold1", "fold2"), ("small", "large")])
def test_an_average_over_divisions_is_continued_on_other_images_only(
    runs: Path, tmp_path: Path, first: str, second: str
) -> None:
    """Each of its runs trained on val or test images of the other."""
    petune.average_adapters([runs / first, runs / second], tmp_path / "soup")
    go_on: dict[str, Any] = {"from_run": tmp_path / "soup", "device": "cpu", "train": TINY["train"]}
    with pytest.raises(petune.ConfigError, match=r"averages runs of different (fold|val_fraction)"):
        petune.run(**go_on, output=tmp_path / "same")
    shutil.copytree(runs / "images", tmp_path / "others")
    petune.run(**go_on, dataset=f"folder:{tmp_path / 'others'}", output=tmp_path / "other")


def test_nothing_is_claimed_of_an_adapter_that_records_no_splits(runs: Path, tmp_path: Path) -> None:
    old = changed(runs / "fold1" / "adapter", tmp_path / "old", split_options=None)
    assert petune.evaluate(old, device="cpu").trained_on is None
    petune.average_adapters([old, runs / "fold2"], tmp_path / "soup")
    assert petune.evaluate(tmp_path / "soup", device="cpu").trained_on is None
    with pytest.raises(petune.UsageError, match=r"val split of .* is unknown"):
        petune.evaluate(old, split="val", device="cpu")


def test_an_average_inside_a_run_is_not_of_that_run(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "large", tmp_path / "large")
    for output in (tmp_path / "elsewhere", tmp_path / "large" / "soup"):
        petune.average_adapters([runs / "small", tmp_path / "large"], output)
        assert petune.evaluate(output, device="cpu").num_trained_on == 0
        with pytest.raises(petune.UsageError, match=r"val split of .* is unknown"):
            petune.evaluate(output, split="val", device="cpu")
    shutil.copytree(runs / "fold1" / "adapter", tmp_path / "large" / "other")
    record = read_splits(runs / "fold1")
    assert record is not None
    assert evaluated(tmp_path / "large" / "other") == (record.test, 0)
