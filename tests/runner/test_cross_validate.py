"""Cross-validation: every image is tested once, groups stay together, folds without a class are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import stats

import petune
from petune.base.errors import ConfigError, DataError
from petune.data import load_dataset
from petune.data.dataset import Dataset, Split
from petune.data.folds import fold_of
from petune.data.target import Target
from tests.program import call

TINY: Any = (
    "--method", "linear", "--backbone", "vit_nano", "--weights", "none", "--dataset", "digits", "--shots", "4",
    "--set", "backbone_options={depth: 2, embed_dim: 24, num_heads: 2}", "--epochs", "1", "--device", "cpu",
)  # fmt: skip


def _dataset(counts: tuple[int, ...], groups: Any = None) -> Dataset:
    labels = np.repeat(np.arange(len(counts)), counts)
    split = Split.of(np.zeros((len(labels), 2, 2, 3), np.uint8), labels)
    if groups is not None:
        split = replace(split, groups=np.asarray(groups, np.int64))
    none = split.take(np.arange(0))
    return Dataset("toy", Target("class", tuple("abcde"[: len(counts)])), "made", "none", split, none, none)


def test_every_image_is_tested_once_and_classes_are_spread() -> None:
    data = _dataset((50, 10, 20)).with_test()
    tested = []
    for fold in range(1, 6):
        cut = fold_of(data, 5, fold)
        assert not {*cut.train.rows} & {*cut.test.rows}
        assert np.bincount(cut.test.targets).tolist() == [10, 2, 4]
        tested += cut.test.rows.tolist()
    assert sorted(tested) == list(range(80))


def test_the_note_about_a_cut_test_split_goes(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / "ab"[number % 2]).mkdir(exist_ok=True)
        Image.new("L", (8, 8), number).save(tmp_path / "ab"[number % 2] / f"{number}.png")
    data = load_dataset(str(tmp_path), image_size=8)
    assert "no test split" in data.source
    assert "no test split" not in fold_of(data, 5, 1).source


def test_groups_and_copies_never_part() -> None:
    data = _dataset((40, 40), np.arange(80) // 4)
    data = replace(data, train=replace(data.train, rows=np.where(np.arange(80) == 79, 0, np.arange(80))))
    for fold in range(1, 5):
        cut = fold_of(data, 4, fold)
        assert cut.train.groups is not None
        assert cut.test.groups is not None
        assert not {*cut.train.groups} & {*cut.test.groups}
        assert not {*cut.train.rows} & {*cut.test.rows}


def test_an_own_test_split_is_not_used() -> None:
    data, other = _dataset((20, 20)), _dataset((4, 4))
    cut = fold_of(replace(data, test=other.train), 4, 1)
    assert len(cut.train) + len(cut.test) == 40


def test_empty_folds_and_folds_without_a_class_are_refused() -> None:
    with pytest.raises(DataError, match="no test image of b"):
        fold_of(_dataset((20, 3)), 5, 1)
    with pytest.raises(DataError, match="of b"):  # ten members in one group: scikit-learn does not warn
        fold_of(_dataset((20, 10), [*range(20), *[99] * 10]), 5, 1)
    with pytest.raises(DataError, match=r"would be empty|too few"):
        fold_of(_dataset((20, 20), [0] * 20 + [1] * 20), 3, 1)
    with pytest.raises(ConfigError, match="fold is 3"):
        petune.RunConfig.build({"folds": 2, "fold": 3})
    with pytest.raises(ConfigError, match="number of folds"):
        petune.cross_validate(dataset="digits")


def test_a_class_that_a_dataset_may_lack_is_in_no_fold() -> None:
    lacking = replace(_dataset((20, 0, 20)), may_lack_classes=True)
    assert np.bincount(fold_of(lacking, 4, 1).test.targets, minlength=3).tolist() == [5, 0, 5]


def test_folds_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    done = call("run", *TINY, "--folds", "2", "--output", "out", capture=capsys)
    assert done.code == 0, done.err
    results = [petune.RunResult.read(tmp_path / "out" / f"fold-{fold}") for fold in (1, 2)]
    validation = petune.CrossValidation.build(json.loads((tmp_path / "out" / "folds.json").read_text()))
    values = tuple(result.metrics["top1"] for result in results)
    assert validation.metrics["top1"] == values
    expected = stats.t.interval(0.95, 1, np.mean(values), stats.sem(values))
    assert validation.interval("top1") == pytest.approx(expected)
    assert "95 % interval" in done.out
    again = call("run", *TINY, "--folds", "2", "--output", "out", capture=capsys)
    assert (again.code, again.out) == (0, done.out)


SEVERAL = ("--folds", "2", "--seeds", "0,3", "--output", "out")
NAMES = ["fold-1-seed0", "fold-1-seed3", "fold-2-seed0", "fold-2-seed3"]


def test_a_dry_run_names_every_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    dry = call("run", *TINY, *SEVERAL, "--dry-run", capture=capsys)
    assert dry.code == 0, dry.err
    assert f"4 runs in out: {', '.join(NAMES)}" in dry.err
    planned = json.loads(call("run", *TINY, *SEVERAL, "--dry-run", "--json", capture=capsys).out)
    assert planned["runs"] == [f"out/{name}" for name in NAMES]
    assert not (tmp_path / "out").exists()


@pytest.mark.exhaustive
def test_folds_and_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    dry = call("run", *TINY, *SEVERAL, "--dry-run", capture=capsys)
    (tmp_path / "cv.yaml").write_text(dry.out)  # repeats the command, but for its seeds
    done = call("run", "--config", "cv.yaml", *SEVERAL[2:], "--json", capture=capsys)
    assert done.code == 0, done.err
    values = [petune.RunResult.read(tmp_path / "out" / name).metrics["top1"] for name in NAMES]
    validation = petune.CrossValidation.read(tmp_path / "out")
    assert validation.metrics["top1"] == pytest.approx((np.mean(values[:2]), np.mean(values[2:])))
    assert (validation.seeds, json.loads(done.out)["seeds"]) == ((0, 3), [0, 3])
    over = call("run", *TINY, "--folds", "2", "--output", f"out/{NAMES[0]}", "--dry-run", capture=capsys)
    assert (over.code, "holds a run" in over.err) == (2, True)


def test_one_run_names_its_fold() -> None:
    """A run of `folds` alone would test on one fold and say nothing."""
    run = {"dataset": "digits", "folds": 5, "backbone": "vit_nano"}
    comparison = petune.CompareConfig.build({"methods": ("linear",), "run": run})
    calls: Any = (
        lambda: petune.run(petune.RunConfig.build(run)),
        lambda: petune.compare(comparison),
        lambda: petune.sweep(petune.SweepConfig.build({"search": {"train.lr": [0.1]}, "run": run})),
        lambda: petune.cross_validate(petune.RunConfig.build(run), seeds=(1, 1)),
        lambda: petune.cross_validate(petune.RunConfig.build(run), seeds=(-1,)),
    )
    for refused in calls:
        with pytest.raises(ConfigError, match=r"fold is not set|each once|seed"):
            refused()
