"""benchmarks/any_task.py makes its datasets, runs every command, and writes a page of the results."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import any_task
import any_task_page
import pytest
from any_task_data import CLASSES, SMOKE, make_datasets

ROOT = Path(__file__).parents[1]
SOURCE = ROOT.parent / "shared" / "data"


@pytest.fixture
def source() -> Path:
    """Return the folder of the real images."""
    if not SOURCE.is_dir():
        pytest.skip(f"no {SOURCE}")
    return SOURCE


@pytest.mark.exhaustive
def test_datasets_depend_on_the_seed_alone(source: Path, tmp_path: Path) -> None:
    files = []
    for number, seed in enumerate((0, 0, 1)):
        folder = tmp_path / str(number)
        make_datasets(source, folder, SMOKE, seed)
        files.append({path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()})
    assert files[0] == files[1] != files[2]
    counts = [sum(path.parts[:3] == ("unbalanced", "train", name) for path in files[0]) for name in CLASSES]
    assert counts == [50, 10, 3, 1]


@pytest.mark.exhaustive
def test_every_command_runs(source: Path, tmp_path: Path) -> None:
    words = [sys.executable, ROOT / "benchmarks" / "any_task.py", "--smoke", "--run", "--keep", "--seeds", "2"]
    cases = [case.name for case in any_task.CASES if case.name != "fashion"]
    folders = ["--output", tmp_path / "runs", "--source", source]
    done = subprocess.run([*words, *folders, "--only", *cases, "grid"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = any_task_page.read_results(tmp_path / "runs" / "results")
    assert len(results) == 3 * len(cases) + 1
    page = any_task_page.section(tmp_path / "runs" / "results")
    assert all(about in page for name, about in any_task_page.DATA.items() if name in cases)
    assert " ± " in page
    assert "mean rank" in page
