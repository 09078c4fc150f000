"""Backbones that an adapter does not belong to, images that are none, and the page that says what is held where."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

import petune
from petune.base.errors import CheckpointError, DataError
from petune.data.folder import load_folder
from petune.tuners.adaptformer import AdaptFormer
from tests.data.test_images import BROKEN
from tests.faults.conftest import FULL, tally
from tests.faults.page import HERE
from tests.injector.test_load import WRONG, _resealed, trained
from tests.tiny import tiny

ROOT = HERE.parents[1]


def test_an_adapter_of_another_backbone(tmp_path: Path) -> None:
    trained().save(tmp_path / "a")
    held = 0
    wrong = WRONG if FULL else dict([*WRONG.items()][:2])  # tests/injector/test_load.py tries all
    for build, message in wrong.values():
        model = build()
        before = {key: t.clone() for key, t in model.state_dict().items()}
        with pytest.raises(CheckpointError, match=message):
            petune.load(model, tmp_path / "a")
        after = model.state_dict()
        held += list(after) == list(before) and all(torch.equal(after[key], t) for key, t in before.items())
    with pytest.raises(CheckpointError, match=r"other options.*Build VPT"):
        petune.load(tiny(), tmp_path / "a", tuner=petune.attach(tiny(), "vpt").tuner)
    with pytest.raises(CheckpointError, match=r"other options.*bottleneck"):
        petune.load(tiny(), tmp_path / "a", tuner=AdaptFormer(bottleneck=3))
    _resealed(tmp_path / "a", lambda c: c.update(format=99))
    with pytest.raises(CheckpointError, match=r"format 99.*pip install -U petune"):
        petune.load(tiny(), tmp_path / "a")
    tried = len(wrong) + 3
    kinds = f"{', '.join(wrong)}, other method, other options, newer format"
    tally(
        f"an adapter on a wrong backbone: {kinds}",
        "refused with the difference named; model unchanged",
        tried,
        held + 3,
    )


def test_images_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PETUNE_CACHE", str(tmp_path / "cache"))
    pets, held = tmp_path / "pets", 0
    for number in range(16):
        (pets / f"class{number % 2}").mkdir(parents=True, exist_ok=True)
        Image.new("L", (9, 9), number).save(pets / f"class{number % 2}" / f"{number}.png")
    kinds = {name: (lambda path, content=content: path.write_bytes(content)) for name, content in BROKEN.items()}
    kinds |= {
        f"bomb{side}.png": (lambda path, side=side: Image.new("1", (side, side)).save(path))
        for side in (10_000, 14_000)
    }
    kinds |= {"grey.tif": lambda path: Image.new("F", (9, 9), 0.5).save(path)}
    kinds |= {"deep.tif": lambda path: Image.new("I", (9, 9), 70_000).save(path)}
    for name, write in kinds.items():
        bad = pets / "class1" / name
        write(bad)
        with pytest.raises(DataError, match=re.escape(str(bad))) as caught:
            load_folder(pets, 16)
        held += "\n" not in str(caught.value)
        bad.unlink()
    assert len(load_folder(pets, 16).train) == 12
    tally(f"kinds of bad image in a folder: {', '.join(kinds)}", "one error with its path", len(kinds), held)


def test_the_page_names_tests_that_are_there() -> None:
    named = re.findall(r"`((?:tests|plugins|benchmarks)/[\w/.-]+\.py)(?:::(\w+))?`", (HERE / "page.md").read_text())
    assert len(named) > 20
    for file, function in named:
        tree = ast.parse((ROOT / file).read_text())
        functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert not function or function in functions, f"{file}::{function}"
