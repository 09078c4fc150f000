"""The scripts for a lent GPU: data in pieces, plans of what fits, pages, and both scripts at smoke size."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import blocks
import gpu
import gpu_page
import pytest
import seed_on_gpu
import seed_on_gpu_page
import speed
import torch
from card import describe_card, peak_tflops
from gpu_steps import GPU_SIZES, STEPS, peft_lora
from pieces import join_pieces, write_pieces
from seed_plan import MARGIN, STAGES, Rate, epochs_left, plan_epochs

import petune
from petune.runner.provenance import provenance

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


def test_a_split_removes_only_earlier_pieces(tmp_path: Path) -> None:
    source, folder = tmp_path / "data" / "cifar10" / "train.parquet", tmp_path / "usb"
    source.parent.mkdir(parents=True)
    source.write_bytes(b"x" * 100)
    files = {"cifar10/train.parquet": source}
    write_pieces(files, folder, 10)
    assert len(write_pieces(files, folder, 50)) == len([*folder.iterdir()]) == 2
    own = folder / "piece-1" / "thesis.tex"
    own.write_text("mine")
    for target in (folder, tmp_path / "data"):
        with pytest.raises(SystemExit, match=r"holds .*\. Choose another folder with --to"):
            write_pieces(files, target, 50)
    with pytest.raises(SystemExit, match=r"there is no .*test\.parquet\. Name the folder"):
        write_pieces({"cifar10/test.parquet": source.with_name("test.parquet")}, folder, 50)
    assert own.read_text() == "mine"
    assert source.exists()
    own.unlink()
    inside = folder / "piece-1" / "data"
    with pytest.raises(SystemExit, match="which is to be split"):
        write_pieces({"data": inside}, folder, 50)
    assert inside.exists()


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


def test_the_page_of_speed_says_that_nothing_has_been_run(tmp_path: Path) -> None:
    assert "It has not been run yet" in gpu_page.section(tmp_path / "none.json")


def _main(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["seed_on_gpu.py", "run", *map(str, words)])
    seed_on_gpu.main()


@pytest.fixture
def studies(monkeypatch: pytest.MonkeyPatch) -> list[seed_on_gpu.Study]:
    """Return the studies that `main` runs, without training."""
    begun: list[seed_on_gpu.Study] = []
    monkeypatch.setattr(seed_on_gpu, "run_study", begun.append)
    monkeypatch.setattr(seed_on_gpu, "write_result", lambda study: {"stages": {}})
    monkeypatch.setattr(seed_on_gpu, "stop_after", lambda seconds: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return begun


def test_a_study_is_continued_at_its_size_and_commit_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, studies: list[seed_on_gpu.Study]
) -> None:
    words = ("--work", tmp_path / "work", "--output", tmp_path, "--smoke")
    monkeypatch.setattr(seed_on_gpu, "git_state", lambda: None)
    for _ in range(2):
        _main(monkeypatch, *words, "--commit", "a")
    assert studies[0] == studies[1]
    with pytest.raises(SystemExit, match=r"begun under other conditions: commit a, now b\. Use another --work"):
        _main(monkeypatch, *words, "--commit", "b")
    with pytest.raises(SystemExit, match="smoke True, now False"):
        _main(monkeypatch, *words[:-1], "--commit", "a")
    (tmp_path / "seed_on_gpu.json").write_text('{"smoke": false}')
    with pytest.raises(SystemExit, match="the result of a measurement, which this one would replace"):
        _main(monkeypatch, "--work", tmp_path / "other", "--output", tmp_path, "--smoke")
    (tmp_path / "work" / "started.json").write_text("1000000000.0")  # as an earlier version wrote it
    with pytest.raises(SystemExit, match="smoke unknown, now True"):
        _main(monkeypatch, *words[:2], "--output", tmp_path / "new", "--smoke")


def test_a_finished_study_is_not_stopped_when_its_time_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, studies: list[seed_on_gpu.Study]
) -> None:
    timers: list[float] = []
    monkeypatch.setattr(seed_on_gpu, "stop_after", timers.append)
    words = ("--work", tmp_path, "--output", tmp_path, "--smoke", "--minutes")
    _main(monkeypatch, *words, 5)
    assert len(timers) == 1
    with pytest.raises(SystemExit, match="0 minutes are over"):
        _main(monkeypatch, *words, 0)
    for stage in STAGES:
        shutil.copytree(ROOT / "tests" / "golden" / "v0" / "vpt", tmp_path / stage)
    _main(monkeypatch, *words, 0)
    assert len(timers) == 1
    assert len(studies) == 2


def test_trials_have_folders_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    written: list[Path] = []

    def stop(file: Path, smoke: bool) -> None:
        written.append(file)
        raise SystemExit

    for script, flag in ((gpu, "--smoke"), (speed, "--quick"), (blocks, "--quick")):
        monkeypatch.setattr(script, "write_json", lambda file, values: stop(file, True))
        monkeypatch.setattr(script, "need_same_size", stop, raising=False)
        monkeypatch.setattr(sys, "argv", [script.__name__, flag])
        if script is blocks:
            monkeypatch.setattr(blocks, "_time_steps", lambda *_: {"step_s": {}})
            monkeypatch.setattr(blocks, "_memory_of_process", lambda *_: {})
            monkeypatch.setattr(blocks, "markdown", lambda _: "")
        with pytest.raises(SystemExit):
            script.main()
    assert [str(file.relative_to(ROOT)) for file in written] == [
        "runs/gpu_smoke/gpu.json", "runs/speed_quick/speed.json", "runs/speed_quick/blocks-toy.json",
    ]  # fmt: skip
    file = tmp_path / "result.json"
    file.write_text('{"smoke": true}')
    for section in (seed_on_gpu_page.section, gpu_page.section):
        with pytest.raises(SystemExit, match="is the result of a trial"):
            section(file)


def test_rows_that_do_not_fit_are_left_out_and_failures_do_not_stop_the_others(tmp_path: Path) -> None:
    def fail() -> dict[str, Any]:
        raise RuntimeError("out of memory\non this card")

    bench = gpu.StepBench(torch.device("cpu"), 0.0)
    result: dict[str, Any] = {
        "command": "gpu.py", "card": describe_card(bench.device), "provenance": provenance(bench.device),
        "products_tflops": {}, "rows": [],
    }  # fmt: skip
    spread = {"low": 0.5, "median": 1.0, "high": 2.0, "count": 3}
    small = {
        "step_s": spread, "images_per_s": 4.0, "against": "other", "time_relative_to_it": spread, "tflops": 98.9,
        "peak_bytes": 10**9,
    }  # fmt: skip
    rows = [gpu.Row("bank", "toy", "fails", fail), gpu.Row("step", "toy", "small", lambda: small)]
    gpu.measure_all(rows, bench, time.perf_counter() + 22, result, tmp_path)  # a bank is expected to take 25 s
    gpu.measure_all(rows[:1], bench, time.perf_counter() + 60, result, tmp_path)
    stored = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert [row["status"] for row in stored] == ["left out", "measured", "failed"]
    page = gpu_page.markdown(result | {"card": result["card"] | {"peak_tflops": 989.0}})
    assert (
        "| toy | small | 1,000.0 (500.0 to 2,000.0) | 4 | other: 1.00 (0.50 to 2.00) | 98.9 | 10.0 % | 1.00 GB |"
        in page
    )
    assert "- failed (RuntimeError: out of memory): toy, fails." in page


@pytest.mark.exhaustive
def test_the_measurement_on_a_gpu_runs_on_a_toy(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "gpu.py"
    words = [sys.executable, str(script), "--smoke", "--no-compile", "--output", str(tmp_path)]
    subprocess.run(words, check=True, capture_output=True, timeout=600)
    result = json.loads((tmp_path / "gpu.json").read_text())
    failed = {row["title"]: row["reason"] for row in result["rows"] if row["status"] != "measured"}
    assert set(failed) <= {"petune adaptformer, int8 backbone"}, failed
    page = gpu_page.markdown(result)
    assert all(f"| toy | {name} |" in page for name in STEPS)
    assert "| toy | vpt, 4 images, 2 adapters |" in page
    assert all(row["largest_difference"] < 1e-4 for row in result["rows"] if row["kind"] == "bank")


@pytest.mark.exhaustive
def test_the_peer_trains_the_layers_of_petunes_lora() -> None:
    size, device = GPU_SIZES["toy"], torch.device("cpu")
    with peft_lora(size, device, False) as step:
        (model,) = [
            cell.cell_contents for cell in step.__closure__ or () if isinstance(cell.cell_contents, torch.nn.Module)
        ]
        peer = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name and p.requires_grad)
    assert peer == petune.attach(size.model(), "lora").counts.tuned


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
        shown = "\n".join(seed_on_gpu_page.measured(json.loads(result.read_text())))
        assert "| pretraining | digits | " in shown
        assert json.loads(result.read_text())["stages"]["pretrain"]["result"] is None
    subprocess.run(words, check=True, timeout=600)
    stages = json.loads(result.read_text())["stages"]
    assert {stage: len(record["curve"]) for stage, record in stages.items()} == dict.fromkeys(STAGES, 3) | {
        "pretrain": 6
    }
    assert all(record["result"]["metrics"]["top1"] > 30 for record in stages.values())
    with pytest.raises(SystemExit, match="the result of a trial"):
        seed_on_gpu_page.section(result)


def test_the_peak_of_a_card_is_found_by_whole_words() -> None:
    names = ("NVIDIA L4", "NVIDIA L40", "NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-80GB")
    assert [peak_tflops(name) for name in names] == [121.0, None, 989.0, None, 312.0]
