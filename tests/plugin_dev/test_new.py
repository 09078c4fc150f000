"""`petune plugin new`: the package installs, registers, passes its own tests and the contract, and trains."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from petune.base.errors import UsageError
from petune.cli.main import main
from petune.plugin_dev.properties import PROPERTIES
from petune.plugin_dev.scaffold import FILES, KINDS, TEMPLATES, write_plugin
from petune.plugin_dev.tiny_models import tiny_models
from petune.serving.restore import restore
from tests.program import call

RUN = (
    "run", "--method", "my_scale", "--backbone", "vit_tiny_patch16_224", "--weights", "none", "--dataset", "digits",
    "--image-size", "32", "--patch-size", "4", "--epochs", "1", "--batch-size", "64", "--output", "out", "--json",
    "--set", "backbone_options.depth=2", "--set", "backbone_options.embed_dim=48", "--set", "shots=8",
)  # fmt: skip


def pip() -> list[str] | None:
    """Return how to run pip; None without pip, or without hatchling to build with."""
    can_build = importlib.util.find_spec("pip") and importlib.util.find_spec("hatchling")
    return [sys.executable, "-m", "pip"] if can_build else None


def test_every_template_is_used() -> None:
    for kind in KINDS:
        assert {path.name for path in (TEMPLATES / kind).iterdir()} == set(FILES.values())


# looking for pip makes setuptools check its own distutils, and warn
@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore:Setuptools is replacing distutils:UserWarning")
def test_the_new_package_works(
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
    else:  # do by hand what an installer does
        project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
        fake(project["name"], project["entry-points"]["petune.tuners"], (root / "petune_my_scale.py").read_text())
    command = [sys.executable, "-m", "pytest", "-q", "-W", "error"]
    done = subprocess.run(command, cwd=root, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout
    rows = {row["name"]: row for row in json.loads(call("methods", "--load", "--json", capture=capfd).out)}
    assert (rows["my_scale"]["distribution"], rows["my_scale"]["state"]) == ("petune-my-scale", "ok")
    checked = json.loads(call("plugin", "check", "my_scale:shift=false", "--json", capture=capfd).out)
    assert [len(one["findings"]) for one in checked] == [len(PROPERTIES)] * len(tiny_models())
    assert not any(finding["problem"] for one in checked for finding in one["findings"])
    ran = call(*RUN, capture=capfd)
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["tuned"] == 2 * 2 * 48
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert (config["tuner"], config["distribution"], config["version"]) == ("my_scale", "petune-my-scale", "0.1.0")
    att = restore(tmp_path / "out").attachment
    assert att.counts.tuned == 2 * 2 * 48


@pytest.mark.parametrize(("kind", "group"), [("dataset", "petune.datasets"), ("task", "petune.tasks")])
def test_a_new_dataset_or_task_meets_its_contract(
    tmp_path: Path, kind: str, group: str, fake: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    assert call("plugin", "new", "fake_new", "--kind", kind, "--in", tmp_path, capture=capfd).code == 0
    root = tmp_path / "petune-fake-new"
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    fake(project["name"], project["entry-points"][group], (root / "petune_fake_new.py").read_text(), group=group)
    names: dict[str, Any] = {}
    exec((root / "tests" / "test_fake_new.py").read_text(), names)
    tests = [value for name, value in names.items() if name.startswith("test_")]
    assert len(tests) == 2
    for test in tests:
        test()
    checked = call("plugin", "check", "fake_new", "--json", capture=capfd)
    assert checked.code == 0
    assert json.loads(checked.out)[0]["library"] == kind


@pytest.mark.parametrize("name", ["", "Scale", "1scale", "my-scale", "a__b", "../evil", "a/b", "scale "])
def test_bad_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="lowercase letters"):
        write_plugin(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_existing_directories_are_not_overwritten(tmp_path: Path) -> None:
    write_plugin("once", tmp_path)
    with pytest.raises(UsageError, match="exists already"):
        write_plugin("once", tmp_path)


def test_the_printed_command_is_quoted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "my plugins").mkdir()
    done = call("plugin", "new", "mine", "--in", tmp_path / "my plugins", capture=capsys)
    assert f"pip install -e '{tmp_path}/my plugins/petune-mine'\n" in done.out


@pytest.mark.parametrize(
    ("name", "kind"),
    [("none", "tuner"), ("true", "task"), ("lambda", "dataset"), ("adaptformer", "tuner"), ("linear", "tuner"),
     ("digits", "dataset"), ("classification", "task")],
)  # fmt: skip
def test_taken_names_are_refused(tmp_path: Path, name: str, kind: Any) -> None:
    with pytest.raises(UsageError, match=rf"{name} is a .* Choose another name"):
        write_plugin(name, tmp_path, kind)
    assert list(tmp_path.iterdir()) == []


def test_class_names_do_not_collide(tmp_path: Path) -> None:
    write_plugin("scale", tmp_path)
    names: dict[str, Any] = {"__name__": "petune_scale"}
    exec(compile((tmp_path / "petune-scale" / "petune_scale.py").read_text(), "petune_scale.py", "exec"), names)
    assert {"Scale", "ScaleConfig", "ScaleAdapter"} <= names.keys()
