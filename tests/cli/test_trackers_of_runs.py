"""Several runs and one tracker: each run has a log of its own."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest

from petune.cli.running import watching
from petune.runner.events import RunStarted


class Log:
    """A tracker that only notes where it logs to."""

    directories: ClassVar[list[str]] = []

    def __init__(self, name: str, directory: Path) -> None:
        self.directories.append(directory.name)

    def close(self) -> None:
        pass


def test_runs_of_one_method_and_seed_have_logs_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("petune.training.trackers.Tracker", Log)
    monkeypatch.setattr(Log, "directories", [])
    with watching("any", tmp_path) as watch:
        for index, dataset in enumerate(("digits", "folder:a/b", "", "")):
            watch(RunStarted("linear", 0, index, 2, done=False, dataset=dataset))
    assert Log.directories == [
        "any", "linear-digits-seed0", "linear-folder_a_b-seed0", "linear-seed0", "linear-seed0-2"
    ]  # fmt: skip
