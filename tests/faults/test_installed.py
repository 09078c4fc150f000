"""The wheel in a virtual environment of its own, far from the tree: commands, entry points, bundled weights."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

from tests.faults.conftest import FULL

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not FULL, reason="a minute; make faults runs it")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, which sees what petune depends on here, but not the tree."""
    place = tmp_path_factory.mktemp("installed")
    file = next(WheelBuilder(str(ROOT)).build(directory=str(place), versions=["standard"]))
    subprocess.run([sys.executable, "-m", "venv", place / "venv"], check=True)
    python = place / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", file], check=True)
    found = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    )
    here = {sysconfig.get_path("purelib"), *(p for p in sys.path if p.endswith("site-packages"))}
    (Path(found.stdout.strip()) / "here.pth").write_text("\n".join(sorted(here)) + "\n")
    (place / "empty").mkdir()
    return place


def _petune(place: Path, *words: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "PETUNE_DATA"}}
    done = subprocess.run(
        [place / "venv" / "bin" / "petune", *words],
        cwd=place / "empty",
        env=environment | {"PETUNE_CACHE": str(place / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_works_far_from_the_tree(place: Path) -> None:
    code = "import petune, petune.weights; print(petune.__file__)"
    python = place / "venv" / "bin" / "python"
    done = subprocess.run([python, "-c", code], cwd=place / "empty", capture_output=True, text=True, check=True)
    assert done.stdout.startswith(str(place / "venv"))
    assert "adaptformer" in _petune(place, "methods")
    small = ("--backbone", "vit_nano", "--image-size", "16", "--dataset", "digits", "--shots", "5")
    _petune(place, "run", *small, "--epochs", "1", "--batch-size", "16", "--device", "cpu", "--output", "r")
    assert "calibration error" in _petune(place, "eval", "r", "--device", "cpu")
    assert "off by" in _petune(place, "export", "r", "r.pt2")
    _petune(place, "report", ".", "--output", "page.html")
