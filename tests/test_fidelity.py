"""The comparison with the authors' code: its committed rows, and how clones are read. To repeat it takes clones."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import fidelity
import fidelity_page
import pytest
import torch
from fidelity_cases import CASES
from fidelity_pairs import Built, Pair
from official_code import clone_of, commit_of, extracted, load
from torch import Tensor, nn


def test_every_case_has_a_row_and_only_a_choice_makes_a_difference() -> None:
    rows = json.loads(fidelity_page.RESULT.read_text())["rows"]
    keys = [(row["method"], row["repository"], row["of"]) for row in rows if row["commit"]]
    assert sorted(keys) == sorted((case.method, case.repository, case.of) for case in CASES)
    for row in rows:
        by_choice = row["note"].startswith("by choice")
        assert (row["output"] <= fidelity_page.EXACT) is not by_choice, row  # also NaN is no equality
        if row["gradient"] is not None:  # measured once, without gradients
            assert (row["gradient"] <= 10 * fidelity_page.EXACT) is not by_choice, row
        assert len(row["commit"]) == 40 or row["note"], row


class _Nan(torch.autograd.Function):
    """The identity, whose gradient is NaN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * float("nan")


class _Toy(nn.Module):
    def __init__(self, broken: bool) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.full((10,), x, dtype=torch.float64)) for x in (0.3, 0.7))
        self.broken, self.on = broken, True

    def forward(self, x_BCHW: Tensor) -> Tensor:
        b = _Nan.apply(self.b) if self.broken else self.b
        return x_BCHW.mean((1, 2, 3))[:, None] * self.on * self.a + self.on * b

    def train(self, mode: bool = True) -> Self:
        return self

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        self.on = False
        yield
        self.on = True


@pytest.mark.parametrize("broken", [False, True])
def test_a_gradient_that_is_nan_is_not_equal(broken: bool) -> None:
    official, own = _Toy(False), _Toy(broken)
    pairs = [Pair(official.a, own.a), Pair(official.b, own.b)]  # Python's max() drops a NaN that is not the first
    output, gradient, _ = fidelity.compared(Built(official, own, pairs, own))
    assert (output, gradient) == pytest.approx((0.0, float("nan") if broken else 0.0), nan_ok=True)


def test_code_of_a_clone_is_imported_and_forgotten(tmp_path: Path) -> None:
    clone = tmp_path / "owner+name"
    (clone / "code").mkdir(parents=True)
    (clone / "code" / "theirs.py").write_text("import missing_package\nfrom neighbor import VALUE\n")
    (clone / "code" / "neighbor.py").write_text("VALUE = 3\n")
    for words in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qm", "x"]):
        subprocess.run(["git", "-C", str(clone), *words], check=True)
    assert clone_of(tmp_path, "owner/name") == clone
    assert clone_of(tmp_path, "owner/other") is None
    assert len(commit_of(clone)) == 40
    with extracted(clone, "code") as root:
        assert load(root / "code", "theirs", stubs=["missing_package"]).VALUE == 3
    assert not {"theirs", "neighbor", "missing_package"} & set(sys.modules)


def test_stubs_decorate_and_have_given_values_and_real_modules_come_back(tmp_path: Path) -> None:
    decorated = "@missing.register('x')\n@missing.ALL.register_module()\nclass Theirs(missing.Base): pass\n"
    (tmp_path / "theirs.py").write_text(f"import missing, json\n{decorated}")
    theirs = load(tmp_path, "theirs", stubs=["missing", "json"], values={"missing.Base": dict})
    assert issubclass(theirs.Theirs, dict)
    assert sys.modules["json"] is json
    assert theirs.json is not json


def test_rows_that_are_not_measured_again_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = fidelity_page.RESULT.read_text()
    (tmp_path / "fidelity.json").write_text(before)
    monkeypatch.setattr(fidelity, "RESULT", tmp_path / "fidelity.json")
    monkeypatch.setattr(fidelity, "write_page", lambda: None)
    new = {**json.loads(before)["rows"][0], "output": 0.5}
    monkeypatch.setattr(fidelity, "measured", lambda case, clone: new)
    for case in CASES:  # with clones of all
        (tmp_path / case.repository.replace("/", "+")).mkdir(exist_ok=True)
    assert fidelity.main(tmp_path / "nowhere", []) == 0
    assert (tmp_path / "fidelity.json").read_text() == before
    assert fidelity.main(tmp_path, ["mona"]) == 0
    rows = json.loads((tmp_path / "fidelity.json").read_text())["rows"]
    old = json.loads(before)["rows"]
    assert rows.count(new) == 1
    assert [row for row in rows if row != new] == [row for row in old if row["method"] != "mona"]
