"""Manifest of a folder: a run must not resume after its images changed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import petune
from petune.base.errors import DataError, PetuneError
from petune.data.lookup import manifest_of
from petune.runner.file_names import MANIFEST_FILE
from petune.runner.run_inputs import check_manifest
from tests.sampling import sampled

CHANGED = r"the images of folder:.* have changed since .* started: "
RUN = {
    "method": "linear", "backbone": "vit_nano", "weights": "none", "device": "cpu",
    "backbone_options": {"depth": 1, "embed_dim": 24}, "train": {"epochs": 2, "batch_size": 8, "precision": "fp32"},
}  # fmt: skip


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    for number, name in enumerate(("bee", "cat")):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(10):
            noise = np.random.default_rng(10 * number + i).integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / "pets" / name / f"{i}.png")
    return tmp_path / "pets"


def _add(pets: Path) -> None:
    shutil.copy(pets / "cat" / "1.png", pets / "cat" / "new.png")


def _replace(pets: Path) -> None:
    (pets / "cat" / "1.png").write_bytes((pets / "cat" / "2.png").read_bytes() + b" ")


def _rename(pets: Path) -> None:
    (pets / "bee").rename(pets / "wasp")


def _part(pets: Path) -> None:
    pets.rename(pets.parent / "train")
    shutil.copytree(pets.parent / "train", pets / "test")
    (pets.parent / "train").rename(pets / "train")


CHANGES = [
    (_add, "train/cat had 10 images, has 11"),
    (_replace, "train/cat had 10 images, has 10 different ones"),
    (_rename, "train/bee had 10 images, has 0, train/wasp had 0 images, has 10"),
]


@pytest.mark.parametrize(("change", "described"), CHANGES)
def test_changes_are_described(change: Callable[[Path], None], described: str, pets: Path, tmp_path: Path) -> None:
    for _ in range(2):
        check_manifest(tmp_path / "run", f"folder:{pets}")
    change(pets)
    with pytest.raises(DataError, match=CHANGED + described):
        check_manifest(tmp_path / "run", f"folder:{pets}")


def test_a_copied_folder_has_the_same_manifest_and_other_datasets_have_none(pets: Path, tmp_path: Path) -> None:
    shutil.copytree(pets, tmp_path / "copy", copy_function=shutil.copyfile)
    assert manifest_of(f"folder:{tmp_path / 'copy'}") == manifest_of(f"folder:{pets}") != {}
    for name in ("digits", "cifar10", "folder:nowhere"):
        check_manifest(tmp_path / "run", name)
    assert not (tmp_path / "run").exists()


def test_evaluating_on_the_run_s_own_folder_uses_its_test_split(pets: Path, tmp_path: Path) -> None:
    run = {**RUN, "dataset": f"folder:{pets}", "output": tmp_path / "run"}
    done = petune.run(**run)
    shutil.copytree(pets, tmp_path / "copy", copy_function=shutil.copyfile)
    for name in (pets, f"{pets}/../pets", tmp_path / "copy"):
        evaluation = petune.evaluate(tmp_path / "run", dataset=f"folder:{name}", device="cpu", precision="fp32")
        assert (evaluation.split, evaluation.num_images, evaluation.top1) == ("test", evaluation.num_images, done.top1)
        assert evaluation.num_images < 20
    pets.rename(tmp_path / "moved")
    with pytest.raises(DataError, match=r"run was trained on folder:.*pets, which does not exist"):
        petune.evaluate(tmp_path / "run")
    (tmp_path / "moved").rename(pets)
    shutil.copytree(pets, tmp_path / "other" / "test")
    shutil.rmtree(tmp_path / "other" / "test" / "cat")
    other = petune.evaluate(tmp_path / "run", dataset=f"folder:{tmp_path / 'other'}", device="cpu", precision="fp32")
    assert other.num_images == 10


@pytest.mark.exhaustive
@pytest.mark.parametrize("change", sampled([_add, _rename, _part], lambda change: change is _rename))
def test_changed_images_are_refused(change: Callable[[Path], None], pets: Path, tmp_path: Path) -> None:
    """By a run, its evaluation, a comparison and a sweep; all of them continue once the images are back."""
    run = {**RUN, "dataset": f"folder:{pets}"}
    done = petune.run(**run, output=tmp_path / "run")
    assert petune.evaluate(tmp_path / "run", device="cpu", precision="fp32").top1 == done.top1
    table = {"run": {k: v for k, v in run.items() if k != "method"}, "output": tmp_path / "table"}
    petune.compare(methods=("linear",), **table)
    sweep = {"run": run, "search": {"train.lr": [0.1, 0.01]}, "test": False, "output": tmp_path / "sweep"}
    petune.sweep(**sweep, trials=1)
    shutil.copytree(pets, tmp_path / "aside")
    (tmp_path / "run" / "result.json").unlink()

    change(pets)
    with pytest.raises(DataError, match=CHANGED):
        petune.run(**run, output=tmp_path / "run", resume=True)
    with pytest.raises(DataError, match=CHANGED):
        petune.compare(methods=("linear", "bitfit"), **table)
    with pytest.raises(DataError, match=CHANGED):
        petune.sweep(**sweep, trials=2)
    with pytest.raises(PetuneError, match=r"the training images of folder:.* changed"):
        petune.evaluate(tmp_path / "run", device="cpu")

    shutil.rmtree(pets)
    (tmp_path / "aside").rename(pets)
    assert petune.run(**run, output=tmp_path / "run", resume=True).top1 == done.top1
    assert [row.status for row in petune.compare(methods=("linear", "bitfit"), **table).rows] == ["done"] * 2
    assert (tmp_path / "run" / MANIFEST_FILE).read_bytes() == (tmp_path / "table" / MANIFEST_FILE).read_bytes()
    assert petune.evaluate(tmp_path / "run", device="cpu", precision="fp32").top1 == done.top1
