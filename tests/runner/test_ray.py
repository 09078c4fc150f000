"""The Ray executor on a stand-in for Ray in this process; tests/faults/test_elsewhere.py has real clusters."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from petune.base.errors import Stopped, UsageError
from petune.runner.executors import RUN, Failure, choose_executor
from petune.runner.executors.executor import Work
from petune.runner.run_config import RunConfig
from petune.training.events import Note


class RayError(Exception):
    """A worker died."""


class RayTaskError(RayError):
    """The function raised."""


class FakeRay(SimpleNamespace):
    """One node with 2 CPUs. A submitted function runs when its result is read."""

    def __init__(self) -> None:
        super().__init__(exceptions=SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError))
        self.connections = 0
        self.is_connected = False
        self.options: list[dict[str, Any]] = []
        self.fault: Exception | None = None

    def is_initialized(self) -> bool:
        return self.is_connected

    def init(self, address: str | None, **options: Any) -> None:
        if address == "ray://nowhere:1":
            raise ConnectionError("nobody there\nand more")
        self.is_connected = True
        self.connections += 1

    def shutdown(self) -> None:
        self.is_connected = False

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": 2.0}}, {"Alive": False, "Resources": {"CPU": 99.0}}]

    def remote(self, function: Callable[..., Any]) -> Any:
        def options(**given: Any) -> Any:
            self.options.append(given)
            return SimpleNamespace(remote=lambda *args: lambda: function(*args))

        return SimpleNamespace(options=options)

    def wait(self, references: list[Any], **options: Any) -> tuple[list[Any], list[Any]]:
        return references[-1:], references[:-1]

    def get(self, reference: Any) -> Any:
        if self.fault is not None:
            raise self.fault
        return reference()


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.setattr(importlib.import_module("petune.runner.executors.ray"), "find_spec", lambda name: True)
    return fake


def _work(config: RunConfig, watch: Any) -> RunConfig:
    assert config.output is not None
    config.output.mkdir(parents=True)
    return config


def _read(config: RunConfig) -> RunConfig | None:
    return config if config.output is not None and config.output.exists() else None


WORK = Work(_work, _read)


def configs(tmp_path: Path, count: int) -> list[RunConfig]:
    return [RunConfig(output=tmp_path / str(number), device="cpu") for number in range(count)]


def test_results_come_as_they_finish_and_finished_ones_first(ray: FakeRay, tmp_path: Path) -> None:
    runs, notes = configs(tmp_path, 4), list[Any]()
    (tmp_path / "2").mkdir()
    executor = choose_executor("ray:cpus=2,retries=5")
    results = list(executor(runs, lambda run: run.output != tmp_path / "0", notes.append, WORK))
    assert [index for index, _ in results] == [2, 3, 1]
    assert all(result == runs[index] for index, result in results)
    assert ray.options == 2 * [{"num_cpus": 2, "num_gpus": 0, "max_retries": 5, "retry_exceptions": [Stopped]}]
    assert notes[0] == Note("2 runs on a Ray cluster of 1 node, 2 CPUs, 0 GPUs")
    assert (ray.connections, ray.is_connected) == (1, False)


@pytest.mark.exhaustive
def test_a_connection_is_kept_inside_the_context(ray: FakeRay, tmp_path: Path) -> None:
    executor: Any = choose_executor("ray")
    with executor:
        for run in configs(tmp_path, 3):
            assert len(list(executor([run], lambda run: True, print, WORK))) == 1
        assert (ray.connections, ray.is_connected) == (1, True)
    assert not ray.is_connected


def test_a_worker_that_died_is_a_failure_and_a_bug_is_raised(ray: FakeRay, tmp_path: Path) -> None:
    ray.fault = RayError("killed\nby the system")
    [(_, failure)] = choose_executor("ray")(configs(tmp_path, 1), lambda run: True, print, WORK)
    assert failure == Failure("RayError", "killed (3 retries)")
    ray.fault = RayTaskError("a bug")
    with pytest.raises(RayTaskError):
        list(choose_executor("ray")(configs(tmp_path, 1), lambda run: True, print, RUN))


def test_a_request_without_a_node_and_a_missing_cluster_are_errors(ray: FakeRay, tmp_path: Path) -> None:
    for name, message in (
        ("ray:cpus=3", "no node of 1 node, 2 CPUs, 0 GPUs has the 3 CPUs"),
        ("ray:gpus=0.5", "and 0.5 GPUs"),
        ("ray://nowhere:1", "no Ray cluster answers at ray://nowhere:1: nobody there"),
    ):
        with pytest.raises(UsageError, match=message):
            list(choose_executor(name)(configs(tmp_path, 1), lambda run: True, print, WORK))
