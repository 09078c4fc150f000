"""`petune data check`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

Run = Callable[..., Any]


def _fill(folder: Path) -> None:
    for number, name in enumerate(("cat", "dog", "d\x1b[31mg")):
        (folder / name).mkdir(parents=True)
        for i in range(2):
            Image.new("L", (9, 9), 40 * number + i).save(folder / name / f"{i}.png")


def test_a_sound_folder(petune: Run, tmp_path: Path) -> None:
    _fill(tmp_path / "pets")
    done = petune("data", "check", "pets")
    assert done.code == 0, done.err
    assert "| cat" in done.out
    assert done.out.endswith("no problems found\n")
    assert "\x1b" not in done.out


def test_a_broken_image_exits_with_4(petune: Run, tmp_path: Path) -> None:
    _fill(tmp_path / "pets")
    (tmp_path / "pets" / "dog" / "0.png").write_bytes(b"GIF89a")
    done = petune("data", "check", "pets")
    assert done.code == 4
    assert "pets/dog/0.png: not a readable image" in done.out
    assert done.out.endswith("1 broken, 0 in two splits, 0 in two classes\n")
    report = json.loads(petune("data", "check", "pets", "--json").out)
    assert report["images"]["train"]["cat"] == 2
    assert len(report["broken"]) == 1


def test_copies_are_counted_and_copies_in_another_class_are_a_problem(petune: Run, tmp_path: Path) -> None:
    _fill(tmp_path / "pets")
    shutil.copy(tmp_path / "pets" / "cat" / "0.png", tmp_path / "pets" / "cat" / "0 (1).png")
    done = petune("data", "check", "pets")
    assert done.code == 0, done.err
    assert done.out.endswith(
        "1 copy within a class; cutting a split keeps copies together\n"
        "too few different images for a val split: cat, d[31mg, dog\nno problems found\n"
    )
    shutil.copy(tmp_path / "pets" / "dog" / "0.png", tmp_path / "pets" / "cat" / "x.png")
    done = petune("data", "check", "pets")
    assert done.code == 4
    assert "pets/dog/0.png is the same file as pets/cat/x.png, in another class\n" in done.out
    assert done.out.endswith("0 broken, 0 in two splits, 1 in two classes\n")
    report = json.loads(petune("data", "check", "pets", "--json").out)
    assert (report["copies"], report["in_two_classes"]) == (1, [["pets/dog/0.png", "pets/cat/x.png"]])


def test_classes_too_small_for_every_split_are_named(petune: Run, tmp_path: Path) -> None:
    _fill(tmp_path / "pets")
    shutil.copy(tmp_path / "pets" / "cat" / "0.png", tmp_path / "pets" / "cat" / "1.png")
    Image.new("L", (9, 9), 99).save(tmp_path / "pets" / "dog" / "2.png")
    done = petune("data", "check", "pets")
    assert done.code == 0, done.err
    assert "too few different images for a test split: cat\n" in done.out
    assert "too few different images for a val split: cat, d[31mg\n" in done.out
    (tmp_path / "split").mkdir()
    shutil.copytree(tmp_path / "pets", tmp_path / "split" / "train")
    shutil.copytree(tmp_path / "pets", tmp_path / "split" / "test")
    report = json.loads(petune("data", "check", "split", "--json").out)
    assert (report["too_few_for_test"], report["too_few_for_val"]) == ([], ["cat"])


def test_a_missing_folder(petune: Run) -> None:
    done = petune("data", "check", "nowhere")
    assert done.code == 4
    assert "no such folder: nowhere" in done.err


def test_unsupported_images_are_reported(petune: Run, tmp_path: Path) -> None:
    _fill(tmp_path / "pets")
    (tmp_path / "pets" / "dog" / "photo.HEIC").write_bytes(b"x")
    done = petune("data", "check", "pets")
    assert done.code == 0, done.err
    assert "1 .heic skipped" in done.out
    assert json.loads(petune("data", "check", "pets", "--json").out)["skipped"] == {".heic": 1}
