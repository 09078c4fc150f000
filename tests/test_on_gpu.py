"""The scripts for a lent GPU: data in pieces, plans of what fits, pages, and both scripts at smoke size."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import seed_on_gpu_page
from pieces import join_pieces, write_pieces
from seed_plan import MARGIN, STAGES, Rate, epochs_left, plan_epochs

ROOT = Path(__file__).parents[1]
WANTED = {"pretrain": 80, "frozen": 10, "not_frozen": 10}


def test_files_arrive_in_pieces(tmp_path: Path) -> None:
    content = {"a/train.parquet": bytes(range(256)) * 9, "a/test.parquet": b"x" * 100, "b/test.parquet": b"y"}
    files = {}
    for name, data in content.items():
        files[name] = tmp_path / "here" / name
        files[name].parent.mkdir(parents=True, exist_ok=True)
        files[name].write_bytes(data)
    pieces = write_pieces(files, tmp_path / "pieces", 1000)
    assert [(piece / "data").stat().st_size for piece in pieces] == [1000, 1000, 405]
    there = tmp_path / "there"
    for piece in reversed(pieces):
        with pytest.raises(SystemExit, match="piece"):
            join_pieces(there, tmp_path / "data")
        shutil.copytree(piece, there / piece.name)
    for _ in range(2):  # the second time they are there
        assert [path.read_bytes() for path in join_pieces(there, tmp_path / "data")] == list(content.values())
    shutil.rmtree(tmp_path / "data")
    (there / "piece-2" / "data").write_bytes(bytes(1000))
    with pytest.raises(SystemExit, match="damaged"):
        join_pieces(there, tmp_path / "data")


@pytest.mark.parametrize(
    ("epoch_s", "planned"),
    [(5, (80, 10, 10)), (10, (49, 10, 10)), (30, (18, 2, 2)), (1000, (1, 1, 1))],
    ids=["all fit", "a shorter pretraining", "all are shorter", "one each"],
)
def test_the_warm_up_decides_how_many_epochs_fit(epoch_s: float, planned: tuple[int, int, int]) -> None:
    rate = Rate(epoch_s / MARGIN, 0.0, compiled=True)
    epochs = plan_epochs(rate, 3 * 15 + 699, WANTED)
    assert tuple(epochs[stage] for stage in STAGES) == planned


def test_the_last_stages_share_what_is_left() -> None:
    rate = Rate(10 / MARGIN, 5.0, compiled=True)
    assert epochs_left(rate, 1000, 10, 2) == 10
    assert epochs_left(rate, 2 * 20 + 100, 10, 2) == 5
    assert epochs_left(rate, 20, 10, 1) == 0


def test_the_page_says_that_nothing_has_been_run(tmp_path: Path) -> None:
    assert "It has not been run yet" in "\n".join(seed_on_gpu_page.section(tmp_path / "none.json"))


@pytest.mark.exhaustive
def test_the_study_is_stopped_killed_resumed_and_shown(tmp_path: Path) -> None:
    script, work = ROOT / "benchmarks" / "seed_on_gpu.py", tmp_path / "work"
    result, metrics = tmp_path / "out" / "seed_on_gpu.json", work / "pretrain" / "metrics.jsonl"
    words = [sys.executable, str(script), "run", "--smoke", "--work", str(work), "--output", str(result.parent)]
    words += ["--minutes", "60", "--warm-up-s", "1"]
    for number in (signal.SIGKILL, signal.SIGTERM):
        process = subprocess.Popen(words)
        length = metrics.stat().st_size if metrics.exists() else 0
        while not (metrics.exists() and metrics.stat().st_size > length) and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(number)
        assert process.wait(120) == {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 75}[number]
        shown = "\n".join(seed_on_gpu_page.section(result))
        assert "| pretraining | digits | " in shown
        assert json.loads(result.read_text())["stages"]["pretrain"]["result"] is None
    subprocess.run(words, check=True, timeout=600)
    stages = json.loads(result.read_text())["stages"]
    assert {stage: len(record["curve"]) for stage, record in stages.items()} == dict.fromkeys(STAGES, 3) | {
        "pretrain": 6
    }
    assert all(record["result"]["metrics"]["top1"] > 30 for record in stages.values())
    assert "not yet" not in "\n".join(seed_on_gpu_page.section(result))
