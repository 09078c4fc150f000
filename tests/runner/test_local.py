"""Several runs at a time on this machine: the same results, signals, lost processes, memory."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import petune
from petune.base.errors import ConfigError, Stopped
from petune.cli.progress import ProgressDisplay
from petune.data.cache import cached_split
from petune.runner.compare_config import CompareConfig
from petune.runner.events import RunEvent, RunStarted
from petune.runner.executors import choose_executor
from petune.runner.executors.local import num_cores
from petune.runner.executors.local_process import Processes
from petune.runner.executors.memory import available_memory, peak_memory
from petune.runner.executors.worker import WorkerJob
from petune.runner.result import RunResult
from petune.training.events import EpochEnded, Note, StepDone

TINY = {
    "backbone": "vit_nano", "weights": "none", "dataset": "digits", "shots": 5, "device": "cpu",
    "backbone_options": {"depth": 1, "embed_dim": 48}, "train": {"epochs": 2, "batch_size": 16, "precision": "fp32"},
}  # fmt: skip
TWO = "local:jobs=2,threads=1"
needs_two_cores = pytest.mark.skipif(num_cores() < 2, reason="two runs at a time need two cores")


def _config(output: Path, *, epochs: int = 2) -> CompareConfig:
    run = {**TINY, "train": {**TINY["train"], "epochs": epochs}}  # type: ignore[dict-item]
    return CompareConfig.build({"methods": ("linear", "bitfit"), "seeds": (0, 1), "run": run, "output": output})


def _numbers(comparison: Any) -> list[tuple[Any, ...]]:
    return [(row.method, row.status, row.seeds, row.metrics, row.lr) for row in comparison.rows]


def test_more_jobs_than_cores_are_refused() -> None:
    with pytest.raises(ConfigError, match=rf"Use at most {num_cores()}$") as caught:
        choose_executor(f"local:jobs={num_cores() + 1}")
    assert caught.value.cli_hint == "Set it with --jobs"
    with pytest.raises(ConfigError, match="jobs"):
        choose_executor("local:jobs=0")


def test_runs_at_a_time_are_labeled(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (RunStarted("vpt", seed, seed, 2, False) for seed in (0, 1))
    with ProgressDisplay(bar=False) as watch:
        watch(Note("2 runs at a time"))
        for run in (first, second):
            watch(run)
        watch(RunEvent(second, Note("a note")))
        watch(RunEvent(first, StepDone(step=1, total_steps=9, epoch=0, loss=1, lr=1, images_per_s=1)))
        watch(RunEvent(second, EpochEnded(1, 2, {"epoch": 1, "train_loss": 1.25})))
        watch(RunEvent(first, EpochEnded(2, 2, {"epoch": 2, "train_loss": 1.5})))
    assert capsys.readouterr().err.splitlines() == [
        "2 runs at a time",
        "[1/2] vpt, seed 0",
        "[2/2] vpt, seed 1",
        "[2/2] vpt, seed 1  a note",
        "[2/2] vpt, seed 1  epoch 1/2  loss 1.250",
        "[1/2] vpt, seed 0  epoch 2/2  loss 1.500",
    ]


def test_images_are_decoded_once_by_runs_that_start_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PETUNE_CACHE", str(tmp_path))
    started, calls = threading.Event(), list[int]()

    def decode(allocate: Callable[..., Any]) -> tuple[Any, Any]:
        calls.append(1)
        started.set()
        allocate(2, 4)[:] = 7
        return np.arange(2), np.arange(2)

    def load() -> None:
        assert cached_split({"files": "same"}, decode).images[1, 2, 3, 0] == 7

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [1]
    assert [file.name for file in (tmp_path / "decoded").glob(".lock-*")] == []


def test_a_process_that_is_stopped_while_it_imports_starts_no_run(tmp_path: Path) -> None:
    values = {**TINY, "train": {**TINY["train"], "epochs": 100_000}}  # type: ignore[dict-item]
    config = petune.RunConfig.build({**values, "method": "linear", "output": tmp_path / "run", "resume": True})
    with Processes(1, 1) as processes:
        (process,) = processes.all
        process.start(0, WorkerJob.create(config, 1))
        processes.stop()
        assert process.popen.poll() == 0
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="Linux")
def test_memory_is_read() -> None:
    assert (available_memory() or 0) > 1e6
    assert peak_memory(os.getpid()) > 1e7
    assert peak_memory(2**30) == 0


@pytest.mark.exhaustive
@needs_two_cores
def test_two_at_a_time_give_the_results_of_one_after_the_other(tmp_path: Path) -> None:
    torch.set_num_threads(1)  # as in the other processes: with another number, sums round differently
    events: list[Any] = []
    together = petune.compare(_config(tmp_path / "together"), executor=TWO, watch=events.append)
    assert _numbers(together) == _numbers(petune.compare(_config(tmp_path / "alone")))
    steps = {event.run.index for event in events if isinstance(event, RunEvent) and isinstance(event.event, StepDone)}
    assert steps == {0, 1, 2, 3}
    files = [file.relative_to(tmp_path / "alone") for file in (tmp_path / "alone").glob("*/adapter/*.safetensors")]
    assert len(files) == 4
    assert all((tmp_path / "alone" / f).read_bytes() == (tmp_path / "together" / f).read_bytes() for f in files)
    events.clear()
    assert petune.compare(_config(tmp_path / "together"), executor=TWO, watch=events.append) == together
    assert [event.done for event in events if isinstance(event, RunStarted)] == [True] * 4


@pytest.mark.exhaustive
@needs_two_cores
def test_a_signal_stops_all_runs_and_the_same_call_resumes(tmp_path: Path) -> None:
    steps: dict[int, int] = {}

    def interrupt(event: Any) -> None:
        if isinstance(event, RunEvent) and isinstance(event.event, StepDone):
            steps[event.run.index] = event.event.step
            if len(steps) == 2:
                signal.raise_signal(signal.SIGINT)
                steps[9] = 0

    with pytest.raises(Stopped):
        petune.compare(_config(tmp_path / "out", epochs=40), executor=TWO, watch=interrupt)
    checkpoints = {file.parents[1].name for file in (tmp_path / "out").glob("*/checkpoints/*")}
    assert len(checkpoints) == 2
    resumed: dict[int, int] = {}

    def first_steps(event: Any) -> None:
        if isinstance(event, RunEvent) and isinstance(event.event, StepDone):
            resumed.setdefault(event.run.index, event.event.step)

    comparison = petune.compare(_config(tmp_path / "out", epochs=40), executor=TWO, watch=first_steps)
    assert [row.status for row in comparison.rows] == ["done", "done"]
    assert min(resumed[0], resumed[1]) > 1


@pytest.mark.exhaustive
@needs_two_cores
def test_a_process_that_is_killed_costs_its_run_only(tmp_path: Path) -> None:
    killed: list[int] = []

    def kill(event: Any) -> None:
        if isinstance(event, RunEvent) and isinstance(event.event, StepDone) and event.run.index == 1 and not killed:
            notes = next((tmp_path / "out").glob("linear-*seed1/notes.txt")).read_text()
            killed.append(int(notes.split()[3]))
            os.kill(killed[0], signal.SIGKILL)

    linear, bitfit = petune.compare(_config(tmp_path / "out", epochs=40), executor=TWO, watch=kill).rows
    assert killed
    assert (linear.status, bitfit.status) == ("failed", "done")
    assert "ProcessLost" in linear.reason
    assert "signal 9" in linear.reason
    again = petune.compare(_config(tmp_path / "out", epochs=40), executor=TWO)
    assert [row.status for row in again.rows] == ["done", "done"]


@pytest.mark.exhaustive
@needs_two_cores
def test_without_memory_for_two_one_runs_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("petune.runner.executors.local.available_memory", lambda: 1e8)
    events: list[Any] = []
    config = _config(tmp_path / "out")
    petune.compare(config, executor=TWO, watch=events.append)
    order = [event.run.index for event in events if isinstance(event, RunEvent)]
    assert order == sorted(order)
    assert sum("GB are available" in event.text for event in events if isinstance(event, Note)) == 1
    assert all(RunResult.exists(Path(str(run.output))) for run in config.runs())
