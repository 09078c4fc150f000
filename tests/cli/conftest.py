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
    "--dataset=digits", "--train-per-class=20", "--epochs=1", "--device=cpu", "--precision=fp32",
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


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a second, of AdaptFormer on digits; to be read, not written."""
    from petune.run import run

    place = tmp_path_factory.mktemp("digits") / "run"
    run(
        method="adaptformer:bottleneck=4",
        backbone="vit_nano",
        weights="none",
        backbone_options={"depth": 2, "embed_dim": 48},
        dataset="digits",
        train_per_class=20,
        device="cpu",
        train={"epochs": 1, "precision": "fp32", "lr": 0.01},
        output=place,
    )
    return place


@pytest.fixture
def plain() -> Callable[[str], str]:
    """Numbers become `#` and runs of spaces one space, for texts that hold measured values."""

    def replace(text: str) -> str:
        return re.sub(r" +", " ", re.sub(r"\d+(?:[.,]\d+)*", "#", text))

    return replace
