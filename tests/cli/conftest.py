"""`petune(...)` runs the program in this process, in an empty directory; `tiny` makes a run of a second."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.program import Done, Run, call

TINY = (
    "--backbone=vit_nano", "--weights=none",
    "--set=backbone_options.depth=2", "--set=backbone_options.embed_dim=48",
    "--dataset=digits", "--shots=20", "--epochs=1", "--device=cpu", "--precision=fp32",
)  # fmt: skip


@pytest.fixture
def petune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`petune("run", "--epochs", 2)`, run in `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("PETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PETUNE_DATA", raising=False)

    def run(*words: object) -> Done:
        return call(*words, capture=capsys)

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
