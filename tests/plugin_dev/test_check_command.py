"""`petune plugin check`: one line per property, exit code 1 if one does not hold; and the fixture for authors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from petune.cli.main import main
from petune.plugin_dev.properties import PROPERTIES

pytest_plugins = ("pytester",)

BROKEN = """
import petune, torch
from torch import nn
class Mean(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.g = nn.Parameter(torch.zeros(dim))
    def forward(self, x):
        return x + self.g * x.mean(0, keepdim=True)
class Fake(petune.Tuner[petune.TunerConfig]):
    def attach(self, edit):
        for block in edit.sites.require_blocks():
            edit.after(block, Mean(block.dim))
"""
REFUSES = """
import petune
class Fake(petune.Tuner[petune.TunerConfig]):
    def attach(self, edit):
        raise petune.AttachError("it wants another model")
"""


def check(*words: str) -> object:
    with pytest.raises(SystemExit) as stopped:
        main(["plugin", "check", *words])
    return stopped.value.code


def test_one_line_per_property(capfd: pytest.CaptureFixture[str]) -> None:
    assert check("adaptformer:bottleneck=2") == 0  # both ReLUs may be silent by chance, so other seeds are tried
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == "timm"
    assert lines[1 : len(PROPERTIES) + 1] == [f"  ok       {prop.name}" for prop in PROPERTIES]
    assert "BROKEN" not in "".join(lines)


@pytest.mark.exhaustive
def test_a_broken_method_is_reported(fake: Callable[..., None], capfd: pytest.CaptureFixture[str]) -> None:
    fake("petune-fake", {"fake": "petune_fake:Fake"}, BROKEN)
    assert check("fake") == 1
    out = capfd.readouterr().out
    assert out.count("  BROKEN   independent images: an image alone differs by") >= 2
    assert check("fake", "--json") == 1
    models = json.loads(capfd.readouterr().out)
    assert [f["name"] for f in models[0]["findings"] if f["problem"]] == ["independent images"]


def test_a_method_that_refuses_every_model_fails_the_check(
    fake: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    fake("petune-fake", {"fake": "petune_fake:Fake"}, REFUSES)
    assert check("fake") == 1
    assert "refused  it wants another model" in capfd.readouterr().out


def test_a_name_of_two_kinds_needs_the_kind(fake: Callable[..., None], capfd: pytest.CaptureFixture[str]) -> None:
    fake("petune-fake", {"digits": "petune_fake:Fake"}, REFUSES)
    assert check("digits") == 2
    assert "--kind" in capfd.readouterr().err
    assert check("digits", "--kind", "dataset") == 0
    assert "BROKEN" not in capfd.readouterr().out


def test_a_name_that_nobody_has_is_looked_for_in_all_kinds(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name, similar in (("digitz", "digits"), ("regresion:loss=mse", "regression"), ("adaptfromer", "adaptformer")):
        assert check(name) == 2
        error = capfd.readouterr().err
        assert "no such method, dataset or task" in error
        assert similar in error
    assert check(str(tmp_path)) == 1
    assert "no images in" in capfd.readouterr().out


EXITS = """
import petune
class Fake(petune.DatasetReader[petune.ReaderConfig]):
    about = "one that exits"
    def load(self, context): raise SystemExit(0)
    def labeled_files(self, part): raise SystemExit(0)
"""


def test_a_dataset_that_exits_is_broken(fake: Callable[..., None], capfd: pytest.CaptureFixture[str]) -> None:
    fake("petune-fake", {"fake": "petune_fake:Fake"}, EXITS, group="petune.datasets")
    assert check("fake") == 1
    assert "BROKEN   images and targets: SystemExit: 0" in capfd.readouterr().out


@pytest.mark.exhaustive
def test_the_fixture_fails_passes_and_skips(fake: Callable[..., None], pytester: pytest.Pytester) -> None:
    fake("petune-fake", {"fake": "petune_fake:Fake", "shy": "petune_fake_shy:Fake"}, BROKEN)
    fake("petune-fake-shy", {"unused": "petune_fake_shy:Fake"}, REFUSES)
    pytester.makepyfile(
        "def test_broken(petune_contract): petune_contract('fake')\n"
        "def test_refused(petune_contract): petune_contract('shy')\n"
        "def test_sound(petune_contract): petune_contract('linear')\n"
    )
    result = pytester.runpytest("-p", "no:cacheprovider")
    kinds = result.parseoutcomes()
    assert kinds["failed"] == kinds["skipped"] == kinds["passed"] >= 2
    result.stdout.fnmatch_lines(["*independent images: an image alone differs*"])
