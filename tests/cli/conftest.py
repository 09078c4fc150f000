"""`petune(...)` runs the program in this process, in an empty directory; `tiny` makes a run of a second."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from petune.cli.main import main

TINY = (
    "--backbone=vit_nano", "--weights=none",
    "--set=backbone_options.depth=2", "--set=backbone_options.embed_dim=48",
    "--dataset=digits", "--train-per-class=20", "--epochs=1", "--device=cpu", "--precision=fp32",
)  # fmt: skip


@dataclass(frozen=True)
class Done:
    """What a command left: exit code, stdout, stderr."""

    code: object
    out: str
    err: str


Run = Callable[..., Done]


@pytest.fixture
def petune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`petune("run", "--epochs", 2)`, run in `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("PETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PETUNE_DATA", raising=False)

    def run(*words: object) -> Done:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(word) for word in words])
        out, err = capsys.readouterr()
        return Done(stopped.value.code, out, err)

    return run


@pytest.fixture
def tiny() -> tuple[str, ...]:
    """Flags of a run that takes a second."""
    return TINY


@pytest.fixture
def plain() -> Callable[[str], str]:
    """Numbers become `#` and runs of spaces one space, for texts that hold measured values."""

    def replace(text: str) -> str:
        return re.sub(r" +", " ", re.sub(r"\d+(?:[.,]\d+)*", "#", text))

    return replace
