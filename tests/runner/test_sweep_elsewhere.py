"""Sweeps whose trials an executor does: the table of one done here, in whatever order they end, also when cut off.

Workers of Ray and Slurm that are killed are in tests/faults/test_elsewhere.py.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from petune.base.errors import PetuneError, Stopped, UsageError
from petune.runner.events import RunStarted
from petune.runner.executors import RUN, Failure, Work, serial
from petune.runner.executors.worker import WorkerJob, read_answer
from petune.runner.run_config import RunConfig
from petune.runner.sweep.fit import FIT
from petune.runner.sweep.search import sweep
from petune.runner.sweep.space import Range
from petune.runner.sweep.sweep_config import SweepConfig
from petune.runner.sweep.trials import Sweep

PLAIN = {
    "method": "linear", "backbone": "vit_nano", "weights": "none", "dataset": "digits", "shots": 5,
    "device": "cpu", "backbone_options": {"depth": 1, "embed_dim": 48},
    "train": {"epochs": 1, "batch_size": 16, "precision": "fp32"},
}  # fmt: skip
GRID = {"train.lr": (0.001, 0.02, 0.3)}
LRS = {"train.lr": Range(low=1e-4, high=1.0, log=True)}
LOST = Failure("WorkerCrashedError", "gone (3 retries)")


def config(place: Path, **fields: Any) -> SweepConfig:
    return SweepConfig.build({"search": GRID, "run": PLAIN, "test": False, "output": place, **fields})


def plain(table: Sweep) -> list[dict[str, Any]]:
    return [row.model_dump(exclude={"time_s", "images_per_s"}) for row in table.rows]


class InProcess:
    """An executor whose worker shares nothing with this process but the disk."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self.pool = pool

    def __call__(
        self, configs: Sequence[RunConfig], wanted: Any, watch: Any, work: Work = RUN
    ) -> Iterator[tuple[int, Any]]:
        jobs = [self.pool.submit(WorkerJob.create(one, 1, work)) for one in configs]
        for index, job in enumerate(jobs):
            yield index, read_answer(job.result(), configs[index], work)


class Backwards:
    """Does the last one first, keeps what it was given, and is cut off before or after the answer number `stop`."""

    def __init__(self, stop: int | None = None, *, said: bool = True, lost: int | None = None) -> None:
        self.stop, self.said, self.lost = stop, said, lost
        self.batches: list[list[str]] = []
        self.done = 0

    def __call__(
        self, configs: Sequence[RunConfig], wanted: Any, watch: Any, work: Work = RUN
    ) -> Iterator[tuple[int, Any]]:
        self.batches.append([one.output.name for one in configs if one.output is not None])
        for index, outcome in serial(configs[::-1], wanted, lambda event: None, work):
            self.done += 1
            if self.done == self.stop and not self.said:
                raise Stopped("stopped by SIGTERM")
            at = len(configs) - 1 - index
            yield at, LOST if at == self.lost else outcome
            if self.done == self.stop:
                raise Stopped("stopped by SIGTERM")


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The directories that are trained in, in their order."""
    original: Any = sys.modules["petune.runner.sweep.fit"].train  # type: ignore[attr-defined]
    seen: list[str] = []

    def noting(one: RunConfig, *rest: Any) -> Any:
        seen.append(str(one.output and one.output.name))
        return original(one, *rest)

    monkeypatch.setattr(sys.modules["petune.runner.sweep.fit"], "train", noting)
    return seen


@pytest.mark.exhaustive
def test_another_process_gives_the_same_table(tmp_path: Path) -> None:
    two = {"search": {"train.lr": (0.001, 0.02)}, "test": True}
    here = sweep(config(tmp_path / "here", **two))
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        there = sweep(config(tmp_path / "there", **two), executor=InProcess(pool))
    assert plain(there) == plain(here)
    assert there.finished
    assert (there.best, there.backbone, there.weights) == (here.best, here.backbone, here.weights)
    assert there.result is not None
    assert here.result is not None
    assert (there.result.top1, there.result.val_top1) == (here.result.top1, here.result.val_top1)
    place = tmp_path / "there"
    assert [file.parent.name for file in place.glob("*/result.json")] == [f"trial-{there.best:03d}"]
    assert [file.parent.name for file in place.glob("*/checkpoints")] == [f"trial-{there.best:03d}"]
    one = here.config.trial({"train.lr": 0.02}).model_copy(update={"output": place / "trial-001", "resume": True})
    fit = FIT.read_result(one)
    assert fit is not None
    assert fit.model_dump(mode="json") == json.loads((place / "trial-001" / "trial.json").read_text())
    assert FIT.read_result(one.model_copy(update={"output": place / "no"})) is None
    with pytest.raises(UsageError, match="different configuration"):
        FIT.read_result(one.model_copy(update={"seed": 1}))


@pytest.mark.exhaustive
@pytest.mark.parametrize("said", [True, False])
def test_a_grid_is_submitted_at_once_and_finished_trials_are_not_repeated(
    said: bool, tmp_path: Path, trained: list[str]
) -> None:
    first = Backwards(2, said=said)
    with pytest.raises(Stopped):
        sweep(config(tmp_path), executor=first)
    half = Sweep.build(json.loads((tmp_path / "sweep.json").read_text()))
    assert [row.state for row in half.rows] == ["running", "done" if said else "running", "done"]
    assert half.best in (1, 2)
    assert not half.finished
    again = Backwards()
    table = sweep(config(tmp_path), executor=again)
    assert first.batches == [["trial-000", "trial-001", "trial-002"]]
    assert again.batches == [["trial-000"] if said else ["trial-000", "trial-001"]]
    assert trained == ["trial-002", "trial-001", "trial-000"]
    assert [row.state for row in table.rows] == ["done"] * 3
    assert sweep(config(tmp_path), executor=(idle := Backwards())) == table
    assert (idle.batches, len(trained)) == ([], 3)


@pytest.mark.exhaustive
def test_batches_give_the_same_table_wherever_they_run_and_are_interrupted(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    fields = {"search": LRS, "trials": 5, "parallel_trials": 2}
    whole = sweep(config(tmp_path / "whole", **fields), executor=(executor := Backwards()))
    assert executor.batches == [["trial-000", "trial-001"], ["trial-002", "trial-003"], ["trial-004"]]
    assert len({row.params["train.lr"] for row in whole.rows}) == 5
    events: list[Any] = []
    here = sweep(config(tmp_path / "here", **fields), watch=events.append)
    assert plain(here) == plain(whole)
    assert [event.index for event in events if isinstance(event, RunStarted)] == [0, 1, 2, 3, 4]
    with pytest.raises(Stopped):
        sweep(config(tmp_path / "cut", **fields), executor=Backwards(3))
    assert plain(sweep(config(tmp_path / "cut", **fields), executor=Backwards())) == plain(whole)
    # in the middle of a batch there were enough, and then more are wanted
    sweep(config(tmp_path / "more", **{**fields, "trials": 3}), executor=Backwards())
    more = sweep(config(tmp_path / "more", search=LRS, trials=5))  # parallel_trials as before
    assert (more.config.parallel_trials, plain(more)) == (2, plain(whole))


@pytest.mark.exhaustive
def test_a_lost_trial_is_a_row_and_a_lost_test_is_an_error(tmp_path: Path) -> None:
    table = sweep(config(tmp_path / "a"), executor=Backwards(lost=1))
    assert [row.state for row in table.rows] == ["done", "failed", "done"]
    assert table.rows[1].reason == LOST.reason
    with pytest.raises(PetuneError, match="failed: WorkerCrashedError"):
        sweep(config(tmp_path / "b", test=True), executor=Backwards(lost=0))
    with pytest.raises(PetuneError, match=r"no result for the trials \[0, 1, 2\]"):
        sweep(config(tmp_path / "c"), executor=lambda *_: iter(()))
    half = config(tmp_path / "b", test=True)
    assert sweep(half, executor=Backwards()).result is not None
