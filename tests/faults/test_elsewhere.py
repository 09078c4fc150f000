"""Runs done by Ray and by submitit's local jobs: workers are killed, the table is the one of runs done here."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import FULL, Program, tally

SMALL = (
    "--backbone=vit_nano", "--weights=none", "--set=backbone_options.depth=2", "--set=backbone_options.embed_dim=48",
    "--dataset=digits", "--shots=20", "--batch-size=16", "--device=cpu", "--precision=fp32",
    "--set=train.log_every=1",
)  # fmt: skip
METHODS, KILLS = ("linear", "adaptformer", "full"), 2
WHERE = {"ray": "ray:address=local", "slurm": "slurm:cluster=local,cpus=1,max_jobs=2,logs="}
slow = pytest.mark.skipif(not FULL, reason="half a minute each; `make faults` does it")


def table(place: Path) -> list[tuple[Any, ...]]:
    rows = json.loads((place / "compare.json").read_text())["rows"]
    return [(row["method"], row["status"], row["metrics"], row["mean"], row["tuned"], row["lr"]) for row in rows]


def trials(place: Path) -> tuple[Any, ...]:
    table = json.loads((place / "sweep.json").read_text())
    rows = [{k: v for k, v in row.items() if k not in {"time_s", "images_per_s"}} for row in table["rows"]]
    return rows, table["best"], table["result"]["metrics"], table["finished"]


def kill_once(place: Path, tried: set[int], result: str = "result.json") -> bool:
    """Kill the worker of a run that has begun to train and is not finished; whether there was one."""
    for notes in place.glob("*/notes.txt"):
        pids = [int(pid) for pid in re.findall(r"done by process (\d+)", notes.read_text())]
        metrics = notes.with_name("metrics.jsonl")
        busy = metrics.exists() and metrics.stat().st_size and not notes.with_name(result).exists()
        if busy and pids[-1] not in tried:
            os.kill(pids[-1], signal.SIGKILL)
            tried.add(pids[-1])
            return True
    return False


def here_and_there(
    name: str, program: Program, tmp_path: Path, words: tuple[str, ...], result: str = "result.json"
) -> set[int]:
    """Run the words in `here`, and in `there` by an executor whose workers are killed; which ones were."""
    here = program.start(*words, tmp_path / "here")
    here.join(400)
    assert here.exitcode == 0
    place = tmp_path / "there"
    where = WHERE[name] + (str(tmp_path / "logs") if name == "slurm" else "")
    process = program.start(*words, place, "--executor", where)
    killed: set[int] = set()
    while process.is_alive() and len(killed) < KILLS:
        kill_once(place, killed, result)
        time.sleep(0.05)
    process.join(400)
    assert process.exitcode == 0
    return killed


@slow
@pytest.mark.parametrize("name", WHERE)
def test_workers_killed(name: str, program: Program, tmp_path: Path) -> None:
    pytest.importorskip("ray" if name == "ray" else "submitit")
    words = ("compare", *METHODS, *SMALL, "--epochs=8", "--output")
    killed = here_and_there(name, program, tmp_path, words)
    place = tmp_path / "there"
    for metrics in place.glob("*/metrics.jsonl"):
        steps = [row["step"] for row in map(json.loads, metrics.read_text().splitlines()) if "step" in row]
        assert steps == sorted(set(steps))
    held = len(killed) if table(place) == table(tmp_path / "here") else 0
    tally(f"SIGKILL of workers of `compare --executor {name}`", "retried; same table as serial runs", len(killed), held)
    assert len(killed) == KILLS


@slow
@pytest.mark.parametrize("name", WHERE)
def test_workers_of_a_sweep_killed(name: str, program: Program, tmp_path: Path) -> None:
    pytest.importorskip("ray" if name == "ray" else "submitit")
    pytest.importorskip("optuna")
    words = ("sweep", "adaptformer", *SMALL, "--epochs=8", "--search=train.lr=1e-4..1e-1:log", "--trials=5",
             "--parallel-trials=3", "--output")  # fmt: skip
    killed = here_and_there(name, program, tmp_path, words, "trial.json")
    place = tmp_path / "there"
    held = len(killed) if trials(place) == trials(tmp_path / "here") else 0
    tally(f"SIGKILL of workers of `sweep --executor {name}`", "retried; same table as serial trials", len(killed), held)
    assert len(killed) == KILLS


@slow
def test_a_sweep_on_ray_told_to_stop_and_started_again(program: Program, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    words = ("sweep", "adaptformer", *SMALL, "--epochs=8", "--search=bottleneck=2,4,8", "--output")
    here = program.start(*words, tmp_path / "here")
    here.join(400)
    place = tmp_path / "there"
    process = program.start(*words, place, "--executor", "ray:address=local")
    while not any(file.stat().st_size for file in place.glob("*/metrics.jsonl")):
        time.sleep(0.05)
        assert process.is_alive()
    os.kill(process.pid or 0, signal.SIGTERM)
    process.join(120)
    assert process.exitcode == 75
    assert "running" in [row["state"] for row in json.loads((place / "sweep.json").read_text())["rows"]]
    again = program.start(*words, place, "--executor", "ray:address=local")
    again.join(400)
    assert again.exitcode == 0
    held = trials(place) == trials(tmp_path / "here")
    tally("SIGTERM of `sweep --executor ray`", "exit 75; after a restart, same table as serial trials", 1, int(held))


@slow
def test_ray_told_to_stop(program: Program, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    place = tmp_path / "x"
    words = ("compare", "adaptformer", *SMALL, "--epochs=100", "--output", place)
    process = program.start(*words, "--executor", "ray:address=local")
    while not any(file.stat().st_size for file in place.glob("*/metrics.jsonl")):
        time.sleep(0.05)
        assert process.is_alive()
    os.kill(process.pid or 0, signal.SIGTERM)
    process.join(120)
    assert process.exitcode == 75
    assert list(place.glob("*/checkpoints/step-*"))
    tally("SIGTERM of `compare --executor ray`", "exit 75; progress of the runs is saved", 1, 1)
