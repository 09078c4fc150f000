"""`petune plugin new`: the package installs, registers, and passes its own tests and the contract as it is."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from petune.cli.main import main
from petune.errors import UsageError
from petune.scaffold import FILES, TEMPLATES, write_plugin


def pip() -> list[str] | None:
    """How to run pip; None where there is none, or no hatchling to build with."""
    have = importlib.util.find_spec("pip") and importlib.util.find_spec("hatchling")
    return [sys.executable, "-m", "pip"] if have else None


def test_every_template_is_used() -> None:
    assert {path.name for path in TEMPLATES.iterdir()} == set(FILES.values())


# looking for pip makes setuptools look whether its own distutils is in place, and say so
@pytest.mark.filterwarnings("ignore:Setuptools is replacing distutils:UserWarning")
def test_the_package_works_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], fake: Callable[..., None]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["plugin", "new", "my_scale"])
    assert stopped.value.code == 0
    assert "petune plugin check my_scale" in capfd.readouterr().out
    root = tmp_path / "petune-my-scale"
    site = tmp_path / "site"
    command = pip()
    if command:
        words = ("install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--target", site, root)
        subprocess.run([*command, *words], check=True)
    else:  # what an installer does, by hand
        project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
        fake(project["name"], project["entry-points"]["petune.tuners"], (root / "petune_my_scale.py").read_text())
    command = [sys.executable, "-m", "pytest", "-q", "-W", "error"]
    done = subprocess.run(command, cwd=root, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout


@pytest.mark.parametrize("name", ["", "Scale", "1scale", "my-scale", "a__b", "../evil", "a/b", "scale "])
def test_bad_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="small letters"):
        write_plugin(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    write_plugin("once", tmp_path)
    with pytest.raises(UsageError, match="exists already"):
        write_plugin("once", tmp_path)
