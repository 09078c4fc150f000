"""Several runs at once, and places that cannot be written."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from petune.base.errors import PetuneError
from petune.runner.result import RunResult
from petune.runner.run import run
from petune.runner.run_config import RunConfig
from tests.faults.conftest import TINY, WAIT_S, Program, tally, tries


@pytest.mark.exhaustive
def test_eight_starts_into_one_directory(program: Program, tmp_path: Path) -> None:
    words = ("run", "--method=linear", *TINY, "--output", tmp_path / "x")
    started = [program.start(*words) for _ in range(8)]
    for process in started:
        process.join(WAIT_S)
    codes = sorted(process.exitcode for process in started if process.exitcode is not None)
    assert codes == [0] + [2] * 7
    assert RunResult.exists(tmp_path / "x")
    tally("eight runs started in one directory", "one runs, seven are refused", 8, 8)


@pytest.mark.exhaustive
def test_eight_starts_without_a_directory(program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words, count = ("run", "--method=linear", *TINY), tries(3, 8)
    started = [program.start(*words) for _ in range(count)]
    for process in started:
        process.join(WAIT_S)
    finished = [place for place in (tmp_path / "runs").iterdir() if RunResult.exists(place)]
    assert [process.exitcode for process in started] == [0] * count
    tally("eight runs started without --output", "eight directories, eight results", count, len(finished))


def tiny_config(place: Path, **fields: Any) -> RunConfig:
    options = {"depth": 1, "embed_dim": 48}
    train = {"epochs": 1, "batch_size": 16, "precision": "fp32", "log_every": 1}
    plain = {"method": "linear", "backbone": "vit_nano", "weights": "none", "dataset": "digits", "device": "cpu"}
    return RunConfig.build(
        {**plain, "backbone_options": options, "shots": 5, "train": train, "output": place, **fields}
    )


@pytest.mark.exhaustive
def test_a_disk_that_is_full_at_any_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls, at = os.fsync, [0], [0]

    def failing(number: int) -> None:
        calls[0] += 1
        if calls[0] == at[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(number)

    monkeypatch.setattr(os, "fsync", failing)
    run(tiny_config(tmp_path / "count"))
    total, held = calls[0], 0
    assert total > 8
    numbers = range(1, total + 1, tries(3, 1))
    for number in numbers:
        place, calls[0], at[0] = tmp_path / f"r{number}", 0, number
        with pytest.raises(PetuneError, match="No space left on device") as caught:
            run(tiny_config(place))
        assert str(place) in str(caught.value)
        at[0] = 0
        result = run(tiny_config(place, resume=True))
        held += caught.value.exit_code in (2, 4) and result.top1 > 0
    tally(
        "a disk that is full at any single write of a run",
        "one error with the path; resumes to the end",
        len(numbers),
        held,
    )


def test_a_place_that_cannot_be_written(tmp_path: Path, program: Program) -> None:
    (tmp_path / "file").write_text("")
    assert program.finish("run", "--method=linear", *TINY, "--output", tmp_path / "file" / "x") == 2
