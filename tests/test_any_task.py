"""benchmarks/any_task.py makes its datasets, runs every command, and writes a page of the results."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import any_task
import any_task_data
import any_task_page
import pytest
from any_task_data import CLASSES, SMOKE, Sizes, make_datasets

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


def test_only_results_of_successful_runs_of_the_same_command_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    metric = {"name": "top1", "label": "top-1", "percent": True}
    done = {"method": "full", "status": "done", "seeds": [0], "images_per_s": 1.0, "metrics": {"top1": [50.0]}}
    failed = {"method": "full", "status": "failed", "reason": "the loss is NaN", "seeds": [], "metrics": {}}
    constants: dict[str, dict[str, float]] = {name: {} for name in any_task_data.MAKERS}
    monkeypatch.setattr(any_task, "make_datasets", lambda *_: constants)
    monkeypatch.setattr(any_task, "run_command", lambda command: 0)
    words = ["any_task.py", "--output", str(tmp_path), "--smoke", "--keep", "--only", "hf"]
    monkeypatch.setattr(sys, "argv", words)
    args = any_task.parse_arguments()
    for command in any_task.list_commands(args, constants):
        if command.case == "hf":
            table = {"task": "classification", "metric_info": [metric], "provenance": {}}
            rows = [failed if command.backbone == "swin" else done]
            command.output.mkdir(parents=True)
            (command.output / "compare.json").write_text(json.dumps({**table, "rows": rows}))
            (command.output / any_task.DONE_BY).write_text(json.dumps(command.record))
    assert any_task.main() == 1
    assert "hf.swin is not kept: full failed: the loss is NaN" in capsys.readouterr().err
    assert [file.name for file in sorted((tmp_path / "results").iterdir())] == ["hf.vit.json", "hf.vit_nano.json"]
    for changed in (["--seeds", "1"], ["--seed", "1"]):
        monkeypatch.setattr(sys, "argv", [*words, *changed])
        assert any_task.main() == 1
        assert "hf.vit is not kept: its result is not that of a finished run" in capsys.readouterr().err
    assert json.loads((tmp_path / "results" / "hf.vit.json").read_text())["command"].count("--seeds 0,1,2") == 1


def test_a_command_that_fails_leaves_no_record_of_an_earlier_one(tmp_path: Path) -> None:
    def command(text: str) -> any_task.Command:
        return any_task.Command("a", "b", text, tmp_path, (), {})

    assert any_task.run_command(command("petune methods --json")) == 0
    assert json.loads((tmp_path / any_task.DONE_BY).read_text())["command"] == "petune methods --json"
    assert any_task.run_command(command("petune methods --nonsense")) != 0
    assert not (tmp_path / any_task.DONE_BY).exists()


def test_seeds_limits_the_runs_of_the_grid_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["any_task.py", "--seeds", "1"])
    constants: dict[str, dict[str, float]] = {name: {} for name in any_task_data.MAKERS}
    *_, grid = any_task.list_commands(any_task.parse_arguments(), constants)
    assert " --seeds 0 " in grid.text


def test_datasets_of_another_seed_or_size_are_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def toy(source: Path, folder: Path, sizes: Sizes, seed: int) -> dict[str, float]:
        folder.mkdir(exist_ok=True)
        (folder / f"{seed}-{sizes.train}").touch()
        if seed == 9:
            raise KeyboardInterrupt
        return {"top1": float(seed)}

    def files() -> list[str]:
        return [file.name for file in (tmp_path / "toy").iterdir()]

    monkeypatch.setattr(any_task_data, "MAKERS", {"toy": toy})
    for sizes, seed in ((Sizes(), 0), (Sizes(), 1), (SMOKE, 1)):
        assert make_datasets(SOURCE, tmp_path, sizes, seed) == {"toy": {"top1": float(seed)}}
        assert files() == [f"{seed}-{sizes.train}"]
    (tmp_path / "toy" / f"1-{SMOKE.train}").rename(tmp_path / "toy" / "kept")
    make_datasets(SOURCE, tmp_path, SMOKE, 1)
    assert files() == ["kept"]
    with pytest.raises(KeyboardInterrupt):
        make_datasets(SOURCE, tmp_path, SMOKE, 9)
    make_datasets(SOURCE, tmp_path, SMOKE, 1)
    assert files() == [f"1-{SMOKE.train}"]


def test_the_page_names_the_conditions_of_every_result(tmp_path: Path) -> None:
    names = ("hf.vit", "hf.swin", "hf.vit_nano")
    places = ({"threads": 1, "device": "a"}, {"threads": 2, "device": "a"}, {"threads": 1, "device": "b"})
    for name, place in zip(names, places, strict=True):
        result = json.loads((any_task_page.RESULTS / f"{name}.json").read_text())
        result["provenance"] |= place | {"versions": {"torch": "2"}, "git": {"commit": "abcdefgh"}}
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    page = any_task_page.section(tmp_path)
    for where in ("with a, 1 thread, ", "with a, 2 threads, ", "with b, 1 thread, "):
        assert f"{where}torch 2, at commit abcdefg" in page
