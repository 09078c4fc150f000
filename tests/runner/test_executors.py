"""Many runs: in order, each in its own directory, failures as outcomes; what an executor is called and needs.

Workers of Ray and Slurm that are killed are in tests/faults/test_elsewhere.py.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import petune
from petune.base.errors import ConfigError, MissingExtra, UnknownName, UsageError
from petune.base.yaml_values import read_yaml
from petune.runner.compare import compare
from petune.runner.compare_config import CompareConfig
from petune.runner.events import RunStarted
from petune.runner.executors import RUN, Failure, Outcome, Started, choose_executor, run_all, serial
from petune.runner.executors.worker import WorkerJob, read_answer
from petune.runner.result import RunResult
from petune.runner.run_config import RunConfig
from petune.training.events import Note

PLAIN = {
    "backbone": "vit_nano", "weights": "none", "dataset": "digits", "shots": 5, "device": "cpu",
    "backbone_options": {"depth": 1, "embed_dim": 48}, "train": {"epochs": 1, "batch_size": 16, "precision": "fp32"},
}  # fmt: skip


def config(method: str, place: Path, **fields: Any) -> RunConfig:
    return RunConfig.build({**PLAIN, "method": method, "output": place, "resume": True, **fields})


@pytest.mark.exhaustive
def test_outcomes_are_in_order_and_include_failures(tmp_path: Path) -> None:
    bad = config("lora:r=4", tmp_path / "b", train={**PLAIN["train"], "lr": 1e4, "grad_clip": None, "optimizer": "sgd"})
    events: list[Any] = []
    configs = [bad, config("linear", tmp_path / "a"), bad.model_copy(update={"output": tmp_path / "c"})]

    def wanted(one: RunConfig) -> bool:
        return one.output != tmp_path / "c"

    first, second, third = run_all(configs, wanted=wanted, watch=events.append)
    assert isinstance(first, Failure)
    assert (first.kind, first.is_retryable) == ("Diverged", False)
    assert isinstance(second, RunResult)
    assert third is None
    assert [event.index for event in events if isinstance(event, Started)] == [0, 1]
    assert run_all(configs[1:2]) == [second]


def test_each_run_needs_its_own_directory(tmp_path: Path) -> None:
    one = config("linear", tmp_path / "a")
    for configs in ([one, one], [one.model_copy(update={"output": None})], [one.model_copy(update={"resume": False})]):
        with pytest.raises(UsageError, match="several runs need an output each"):
            run_all(configs)


def test_a_worker_does_a_run_and_answers_with_plain_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one = config("linear", Path("a"))
    answer = WorkerJob.create(one, 1)()
    found = read_answer(answer, one)
    assert isinstance(found, RunResult)
    assert found == RunResult.read(tmp_path / "a")
    assert "done by process" in (tmp_path / "a" / "notes.txt").read_text()
    with pytest.raises(UsageError, match="has no result here"):
        read_answer(answer, config("linear", Path("elsewhere")))
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    trial = WorkerJob.create(one, 1)
    (tmp_path / "gone").rmdir()
    with pytest.raises(UsageError, match="Start petune in a directory that all machines share"):
        read_answer(trial(), one)


@pytest.mark.exhaustive
def test_a_comparison_takes_outcomes_in_any_order(tmp_path: Path) -> None:
    def backwards(configs: Sequence[RunConfig], *rest: Any) -> Iterator[tuple[int, Outcome]]:
        yield from ((len(configs) - 1 - i, outcome) for i, outcome in serial(configs[::-1], *rest))

    plan = {"methods": ("linear", "bitfit"), "seeds": (0, 1), "run": {**PLAIN}}
    here = compare(CompareConfig.build({**plan, "output": tmp_path / "here"}))
    there = compare(CompareConfig.build({**plan, "output": tmp_path / "there"}), executor=backwards)

    def numbers(comparison: Any) -> list[tuple[Any, ...]]:
        return [(row.method, row.seeds, row.metrics, row.tuned, row.lr) for row in comparison.rows]

    assert numbers(there) == numbers(here)
    started: list[RunStarted] = []
    compare(here.config, watch=lambda event: started.append(event) if isinstance(event, RunStarted) else None)
    assert [(event.method, event.seed, event.done) for event in started] == [
        ("linear", 0, True), ("linear", 1, True), ("bitfit", 0, True), ("bitfit", 1, True),
    ]  # fmt: skip


def test_executors_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_executor("serial") is choose_executor(serial) is serial
    with pytest.raises(UsageError, match="executor serial has no options: serial:cpus=2"):
        choose_executor("serial:cpus=2")
    with pytest.raises(UnknownName, match=r"no such executor: rai\. Did you mean ray"):
        choose_executor("rai")
    monkeypatch.setattr(importlib.import_module("petune.runner.executors.ray"), "find_spec", lambda name: True)
    made: Any = choose_executor("ray://head:10001:cpus=2,gpus=0.5")
    assert (made.options.address, made.options.cpus, made.options.gpus) == ("ray://head:10001", 2, 0.5)
    with pytest.raises(ConfigError, match=r"no such key: cpu\. Did you mean cpus"):
        choose_executor("ray:cpu=2")
    for name in ("ray", "slurm"):
        monkeypatch.setattr(importlib.import_module(f"petune.runner.executors.{name}"), "find_spec", lambda name: None)
        with pytest.raises(MissingExtra, match=rf'pip install "petune\[{name}\]"'):
            choose_executor(name)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="executor ray cannot be used with torchrun"):
        choose_executor("ray")


@pytest.mark.exhaustive
@pytest.mark.parametrize("finished", [RUN.read_result, lambda one: next(iter(serial([one], lambda _: True, print)))[1]])
def test_a_finished_run_of_another_configuration_is_refused(finished: Any, tmp_path: Path) -> None:
    done = run_all([config("linear", tmp_path / "a")])[0]
    assert finished(config("linear", tmp_path / "a")) == done
    with pytest.raises(UsageError, match="was started with a different configuration"):
        finished(config("linear", tmp_path / "a", train={**PLAIN["train"], "lr": 0.05}))


def test_a_method_that_cannot_be_built_is_refused_before_anything_trains(tmp_path: Path) -> None:
    events: list[Any] = []
    for method, said in (("adaptfomer", "Did you mean adaptformer"), ("adaptformer:bottleneck=0", "bottleneck")):
        plain = CompareConfig.build({"methods": ("linear", method), "run": PLAIN, "output": tmp_path / "c"})
        with pytest.raises(UsageError, match=said):
            compare(plain, watch=events.append)
    assert events == []


def test_something_that_is_no_executor_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for function, more in ((petune.compare, {"methods": ("linear",)}), (petune.sweep, {"search": {"train.lr": [0.1]}})):
        wrong: Any = {"executor": 3, "output": tmp_path / "c", "run": PLAIN, **more}
        with pytest.raises(
            UsageError, match="executor must be serial, local, ray, slurm or a function like them, not 3"
        ):
            function(**wrong)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("wrong", [{"seeds": (-1,)}, {"seeds": (2**31,)}, {"lrs": {"linear": 1e9}}])
def test_seeds_and_rates_have_the_limits_of_a_run(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"seeds\.0|lrs\.linear"):
        CompareConfig.build({"methods": ("linear",), **wrong})


@pytest.mark.exhaustive
def test_a_comparison_lists_machines_and_needs_its_own_directory(tmp_path: Path) -> None:
    place, events = tmp_path / "c", list[Any]()
    asked = CompareConfig.build({"methods": ("linear", "norm"), "run": PLAIN, "output": place})
    assert compare(asked).origins == ()
    file = place / "linear-vit_nano-digits-seed0" / "result.json"
    result = json.loads(file.read_text())
    result["provenance"]["threads"] = 64
    file.write_text(json.dumps(result))
    one, other = compare(asked).origins
    assert (one.runs, one.provenance["threads"], other.runs) == ({"linear": (0,)}, 64, {"norm": (0,)})
    text = (place / "compare.md").read_text()
    assert "- linear (seed 0): " in text
    assert ", 64 threads, fp32; petune " in text
    again = CompareConfig.build({**asked.model_dump(), "methods": ("norm",)})
    compare(again, watch=events.append)
    notes = [event.text for event in events if isinstance(event, Note)]
    assert len(notes) == 1
    assert "not in the table this time: linear" in notes[0]
    assert CompareConfig.build(read_yaml(place / "config.yaml") | {"output": place}, "config.yaml") == again
    with pytest.raises(UsageError, match="is a run, not a comparison"):
        compare(CompareConfig.build({**asked.model_dump(), "output": file.parent}))
