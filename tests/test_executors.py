"""Many runs: in order, each in its own directory, failures as outcomes; what an executor is called and needs.

Workers of Ray and Slurm that are killed are in tests/faults/test_elsewhere.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from petune.compare import CompareConfig, RunStarted, compare
from petune.errors import ConfigError, MissingExtra, UnknownName, UsageError
from petune.executors import Failure, Outcome, Started, choose_executor, run_all, serial
from petune.executors.trial import Trial, outcome_of
from petune.results import RunResult
from petune.run import RunConfig

PLAIN = {
    "backbone": "vit_nano", "weights": "none", "dataset": "digits", "train_per_class": 5, "device": "cpu",
    "backbone_options": {"depth": 1, "embed_dim": 48}, "train": {"epochs": 1, "batch_size": 16, "precision": "fp32"},
}  # fmt: skip


def config(method: str, place: Path, **fields: Any) -> RunConfig:
    return RunConfig.build({**PLAIN, "method": method, "output": place, "resume": True, **fields})


def test_outcomes_come_in_order_and_failures_are_some_of_them(tmp_path: Path) -> None:
    bad = config("lora:r=4", tmp_path / "b", train={**PLAIN["train"], "lr": 1e4, "grad_clip": None, "optimizer": "sgd"})
    events: list[Any] = []
    configs = [bad, config("linear", tmp_path / "a"), bad.model_copy(update={"output": tmp_path / "c"})]

    def wanted(one: RunConfig) -> bool:
        return one.output != tmp_path / "c"

    first, second, third = run_all(configs, wanted=wanted, watch=events.append)
    assert isinstance(first, Failure)
    assert first.reason.startswith("Diverged: loss and gradient must stay finite")
    assert isinstance(second, RunResult)
    assert third is None
    assert [event.index for event in events if isinstance(event, Started)] == [0, 1]
    assert run_all(configs[1:2]) == [second]


def test_each_run_needs_a_place_of_its_own(tmp_path: Path) -> None:
    one = config("linear", tmp_path / "a")
    for configs in ([one, one], [one.model_copy(update={"output": None})], [one.model_copy(update={"resume": False})]):
        with pytest.raises(UsageError, match="each of many runs needs an output of its own"):
            run_all(configs)


@pytest.fixture
def same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("same_threads")
def test_a_worker_does_a_run_and_tells_in_plain_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one = config("linear", Path("a"))
    answer = Trial.of(one, 1)()
    found = outcome_of(answer, one)
    assert isinstance(found, RunResult)
    assert found == RunResult.read(tmp_path / "a")
    assert "done by process" in (tmp_path / "a" / "notes.txt").read_text()
    with pytest.raises(UsageError, match="its result is not seen from here"):
        outcome_of(answer, config("linear", Path("elsewhere")))
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    trial = Trial.of(one, 1)
    (tmp_path / "gone").rmdir()
    with pytest.raises(UsageError, match=r"must be a directory that .* shares"):
        outcome_of(trial(), one)


def test_a_comparison_takes_outcomes_in_any_order(tmp_path: Path) -> None:
    def backwards(configs: Sequence[RunConfig], *rest: Any) -> Iterator[tuple[int, Outcome]]:
        yield from ((len(configs) - 1 - i, outcome) for i, outcome in serial(configs[::-1], *rest))

    plan = {"methods": ("linear", "bitfit"), "seeds": (0, 1), "run": {**PLAIN}}
    here = compare(CompareConfig.build({**plan, "output": tmp_path / "here"}))
    there = compare(CompareConfig.build({**plan, "output": tmp_path / "there"}), executor=backwards)

    def numbers(comparison: Any) -> list[tuple[Any, ...]]:
        return [(row.method, row.seeds, row.top1, row.tuned, row.lr) for row in comparison.rows]

    assert numbers(there) == numbers(here)
    started: list[RunStarted] = []
    compare(here.config, watch=lambda event: started.append(event) if isinstance(event, RunStarted) else None)
    assert [(event.method, event.seed, event.done) for event in started] == [
        ("linear", 0, True), ("linear", 1, True), ("bitfit", 0, True), ("bitfit", 1, True),
    ]  # fmt: skip


def test_executors_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_executor("serial") is serial
    with pytest.raises(UnknownName, match="no executor is called 'rai'; did you mean 'ray'"):
        choose_executor("rai")
    monkeypatch.setattr(importlib.import_module("petune.executors.ray"), "find_spec", lambda name: True)
    made: Any = choose_executor("ray://head:10001:cpus=2,gpus=0.5")
    assert (made.options.address, made.options.cpus, made.options.gpus) == ("ray://head:10001", 2, 0.5)
    with pytest.raises(ConfigError, match="cpu: no such key; did you mean 'cpus'"):
        choose_executor("ray:cpu=2")
    for name in ("ray", "slurm"):
        monkeypatch.setattr(importlib.import_module(f"petune.executors.{name}"), "find_spec", lambda name: None)
        with pytest.raises(MissingExtra, match=rf'pip install "petune\[{name}\]"'):
            choose_executor(name)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="take --executor serial, not ray"):
        choose_executor("ray")
