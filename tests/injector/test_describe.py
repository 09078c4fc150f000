"""Descriptions of tuners, read from their source files: complete for what is in this repository, harmless otherwise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import petune
from petune.base.plugins import PluginRecord
from petune.injector.describe import TunerDescription, describe_tuner, parse_docstring

WITHOUT_PAPER = {"full", "linear", "peft"}
HERE = [record for record in petune.list_tuners() if record.distribution.startswith("petune")]


@pytest.mark.parametrize("record", HERE, ids=lambda record: record.name)
def test_every_method_says_what_it_does_what_it_trains_and_its_paper(record: PluginRecord) -> None:
    description = describe_tuner(record)
    assert 10 < len(description.summary) <= 90
    assert not description.summary.endswith(".")
    assert 5 < len(description.trains) <= 60
    assert bool(description.arxiv) == (record.name not in WITHOUT_PAPER)
    assert bool(description.paper) == (record.name not in WITHOUT_PAPER)


def test_a_docstring_is_taken_apart() -> None:
    docstring = (
        "Scale every output.\n\nSSF (Lian et al., NeurIPS 2022,\narXiv 2210.08823), by formula.\n\n"
        "Trains: one scale\nper channel. Not the identity.\nParameters: D.\n"
    )
    assert parse_docstring(docstring) == TunerDescription(
        summary="Scale every output",
        trains="one scale per channel",
        paper="Lian et al., NeurIPS 2022",
        arxiv="2210.08823",
    )
    assert parse_docstring("") == TunerDescription()


def record(target: str) -> PluginRecord:
    return PluginRecord("fake", "petune-fake", "1.0", target, "ok", package_summary="A fake")


@pytest.mark.parametrize("code", ["class Fake: pass", "raise SystemExit(3)\nclass Fake: pass", "class Fake(:", None])
def test_a_plugin_without_a_docstring_has_its_packages_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str | None
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    if code is not None:
        (tmp_path / "petune_fake_described.py").write_text(code)
    for target in ("petune_fake_described:Fake", "petune_fake_described.inner:Fake", "nowhere.at.all:Fake"):
        assert describe_tuner(record(target)) == TunerDescription(summary="A fake")
    assert "petune_fake_described" not in sys.modules


def test_a_plugin_in_a_package_is_described_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    package = tmp_path / "petune_fake_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit(3)")
    (package / "tuner.py").write_text('class Fake:\n    """Fake it."""\n')
    assert describe_tuner(record("petune_fake_package.tuner:Fake")) == TunerDescription(summary="Fake it")
    assert "petune_fake_package" not in sys.modules


def test_listing_methods_imports_neither_torch_nor_a_tuner() -> None:
    code = (
        "import sys\nfrom petune.cli.main import main\n"
        "try: main(['methods'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'timm', 'peft', 'petune_ssf'}\n"
        "print([m for m in sys.modules if m in heavy or m.startswith('petune.tuners')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
