"""The scripts in examples/ run, offline and without a warning."""

from __future__ import annotations

import runpy
import warnings
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
PRINTED = {
    "compare_methods": "adaptformer:bottleneck=16: ",
    "many_adapters": "birds: class ",
    "own_loop": "the same logits",
    "own_tuner": "tuned 384 ",
}


def test_all_examples_are_found() -> None:
    assert [file.stem for file in EXAMPLES] == sorted(PRINTED)


CASES = [
    pytest.param(file, id=file.stem, marks=[pytest.mark.exhaustive] if file.stem == "compare_methods" else [])
    for file in EXAMPLES
]


@pytest.mark.parametrize("file", CASES)
def test_an_example_runs(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PETUNE_CACHE", str(tmp_path / "cache"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runpy.run_path(str(file), run_name="__main__")
    assert PRINTED[file.stem] in capsys.readouterr().out
    assert len(file.read_text(encoding="utf-8").splitlines()) < 60
