"""Images that an earlier run had keep their split in a run that continues it, also when the folder has new images."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import petune
from petune.base.errors import DataError, PetuneError, UsageError
from petune.runner.migrations import read_config
from petune.runner.run_config import RunConfig
from petune.runner.run_data import prepare_data
from tests.data.tables import write_images, write_table

TINY: dict[str, Any] = {
    "method": "linear", "backbone": "vit_nano", "weights": "none", "image_size": 8, "device": "cpu",
    "backbone_options": {"depth": 1, "embed_dim": 24, "num_heads": 2},
}  # fmt: skip
TRAIN: dict[str, Any] = {"epochs": 1, "batch_size": 16, "precision": "fp32", "lr": 0.01}


def add_images(folder: Path, numbers: range) -> None:
    for i in numbers:
        file = folder / "ab"[i % 2] / f"{(i * 7919) % 1000}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)).save(file)


def run(folder: Path | str, output: Path, **fields: Any) -> petune.RunResult:
    first = {} if "from_run" in fields else TINY
    return petune.run(**first, dataset=f"folder:{folder}", train=TRAIN, output=output, **fields)


def files_of(output: Path) -> dict[str, set[str]]:
    """Return the names of the files in each split of a run."""
    dataset = prepare_data(RunConfig.build(read_config(output / "config.yaml")), output)
    return {part: {Path(name).name for name in getattr(dataset, part).names} for part in ("train", "val", "test")}


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    add_images(tmp_path / "flat", range(60))
    run(tmp_path / "flat", tmp_path / "first")
    return tmp_path / "flat"


def test_new_images_are_divided_and_the_others_stay(flat: Path, tmp_path: Path) -> None:
    before = files_of(tmp_path / "first")
    add_images(flat, range(60, 120))
    run(flat, tmp_path / "second", from_run=tmp_path / "first")
    after = files_of(tmp_path / "second")
    new = {part: after[part] - before[part] for part in after}
    assert all(before[part] <= after[part] for part in before)
    assert [len(new[part]) for part in ("train", "val", "test")] == pytest.approx([43, 5, 12], abs=6)
    own = petune.evaluate(tmp_path / "second", device="cpu")
    assert own.num_images == len(after["test"])
    shutil.rmtree(tmp_path / "first")
    assert petune.evaluate(tmp_path / "second", device="cpu").metrics == own.metrics
    run(flat, tmp_path / "third", from_run=tmp_path / "second")
    assert files_of(tmp_path / "third") == after
    shutil.copytree(tmp_path / "second" / "adapter", tmp_path / "alone")
    with pytest.raises(UsageError, match="run directory"):
        petune.evaluate(tmp_path / "alone", device="cpu")


def test_a_copy_of_the_folder_with_new_images_keeps_them_too(flat: Path, tmp_path: Path) -> None:
    before = files_of(tmp_path / "first")
    shutil.copytree(flat, tmp_path / "other")
    for file in sorted((tmp_path / "other").rglob("*.png")):
        file.rename(file.with_name(f"renamed-{file.name}"))
    add_images(tmp_path / "other", range(60, 90))
    run(tmp_path / "other", tmp_path / "second", from_run=tmp_path / "first")
    after = files_of(tmp_path / "second")
    assert all({f"renamed-{name}" for name in before[part]} <= after[part] for part in before)


def test_what_was_trained_on_earlier_and_removed_for_a_while_is_not_tested(flat: Path, tmp_path: Path) -> None:
    gone = {name: next(flat.rglob(name)) for name in sorted(files_of(tmp_path / "first")["train"])[:10]}
    for name, file in gone.items():
        file.rename(tmp_path / name)
    run(flat, tmp_path / "second", from_run=tmp_path / "first")
    for name, file in gone.items():
        (tmp_path / name).rename(file)
    run(flat, tmp_path / "third", from_run=tmp_path / "second")
    assert set(gone) <= files_of(tmp_path / "third")["train"]


def test_a_run_without_a_record_is_refused_if_images_changed(flat: Path, tmp_path: Path) -> None:
    (tmp_path / "first" / "splits.json").unlink()
    run(flat, tmp_path / "same", from_run=tmp_path / "first")
    add_images(flat, range(60, 70))
    with pytest.raises(DataError, match="changed since"):
        run(flat, tmp_path / "second", from_run=tmp_path / "first")
    assert not (tmp_path / "second").exists()


def test_images_that_are_all_others_are_refused(flat: Path, tmp_path: Path) -> None:
    for file in flat.rglob("*.png"):  # the same ones, written by another program
        file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(DataError, match="only 0 of the 60 images"):
        run(flat, tmp_path / "second", from_run=tmp_path / "first")


def test_own_test_images_that_were_trained_on_are_refused(tmp_path: Path) -> None:
    add_images(tmp_path / "own" / "train", range(40))
    add_images(tmp_path / "own" / "test", range(40, 60))
    run(tmp_path / "own", tmp_path / "first")
    val = files_of(tmp_path / "first")["val"]
    add_images(tmp_path / "own" / "train", range(60, 90))
    run(tmp_path / "own", tmp_path / "second", from_run=tmp_path / "first")
    assert val <= files_of(tmp_path / "second")["val"]
    trained = next((tmp_path / "own" / "train" / "a").glob(min(files_of(tmp_path / "first")["train"] - val)), None)
    trained = trained or next(file for file in (tmp_path / "own" / "train" / "a").iterdir() if file.name not in val)
    shutil.copy(trained, tmp_path / "own" / "test" / "a" / "copy.png")
    with pytest.raises(PetuneError, match="trained on 1 of 21 images of test"):
        run(tmp_path / "own", tmp_path / "third", from_run=tmp_path / "second")


def test_groups_of_a_table_stay_whole(tmp_path: Path) -> None:
    files = write_images(tmp_path, 60)
    rows = [{"file": name, "label": "ab"[i % 2], "who": i % 20} for i, name in enumerate(files)]
    table = f"{write_table(tmp_path / 't.csv', rows[:40])},group=who"
    petune.run(**TINY, dataset=table, train=TRAIN, output=tmp_path / "first")
    before = files_of(tmp_path / "first")
    write_table(tmp_path / "t.csv", rows)
    petune.run(from_run=tmp_path / "first", train=TRAIN, output=tmp_path / "second")
    after = files_of(tmp_path / "second")
    assert before["train"] | before["val"] | before["test"] == set(files[:40])
    assert all(
        after[p] == {files[i + k] for i in range(20) if files[i] in before[p] for k in (0, 20, 40)} for p in after
    )
