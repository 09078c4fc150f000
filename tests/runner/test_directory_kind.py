"""A directory that another command has made is named as what it is, with the command that continues it."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest

from petune.base.errors import UsageError
from petune.runner.compare import compare
from petune.runner.directory_kind import check_kind, kind_of
from petune.runner.pretrain import pretrain
from petune.runner.run import run
from petune.runner.sweep.search import sweep

GOLDEN = Path(__file__).parents[1] / "golden" / "v0"
DIRECTORIES = {"run": "bitfit", "pretrain": "pretrain", "compare": "compare", "sweep": "sweep"}


@pytest.mark.parametrize("maker", DIRECTORIES)
@pytest.mark.parametrize("command", DIRECTORIES)
def test_a_directory_is_for_the_command_that_made_it(command: str, maker: str) -> None:
    directory = GOLDEN / DIRECTORIES[maker]
    assert kind_of(directory) == maker
    if command == maker:
        return check_kind(directory, command)
    with pytest.raises(UsageError) as caught:
        check_kind(directory, command)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert f"petune {maker} --config {directory}/config.yaml --output {directory}" in message
    return None


def test_new_and_unknown_directories_are_for_every_command(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 3\n")
    for command in DIRECTORIES:
        check_kind(tmp_path, command)
        check_kind(tmp_path / "missing", command)


def test_paths_in_the_advice_are_quoted(tmp_path: Path) -> None:
    directory = tmp_path / "two words"
    directory.mkdir()
    (directory / "config.yaml").write_text("# petune sweep --config config.yaml\n")
    with pytest.raises(UsageError) as caught:
        check_kind(directory, "run")
    assert shlex.quote(str(directory)) in str(caught.value)


@pytest.mark.parametrize("maker", DIRECTORIES)
def test_no_command_continues_the_work_of_another(maker: str, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / DIRECTORIES[maker], tmp_path / "here")
    files = sorted(tmp_path.rglob("*"))
    plain = {"dataset": "digits", "backbone": "vit_base", "weights": "default"}  # weights that are not downloaded
    calls = {
        "run": lambda: run(output=tmp_path / "here", resume=True, **plain),
        "pretrain": lambda: pretrain(output=tmp_path / "here", resume=True, dataset="digits"),
        "compare": lambda: compare(methods=("linear",), output=tmp_path / "here", run=plain),
        "sweep": lambda: sweep(search={"bottleneck": (2, 4)}, output=tmp_path / "here", run=plain),
    }
    for command, call in calls.items():
        if command != maker:
            with pytest.raises(UsageError, match=f"petune {maker} --config"):
                call()
    assert sorted(tmp_path.rglob("*")) == files
