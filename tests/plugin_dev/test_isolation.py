"""A broken plugin breaks nothing else, and using it names the package and the cause: ten kinds of broken."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import petune
from petune.base.errors import PluginError, UnknownName
from petune.injector.registry import list_tuners, load_tuner
from tests.program import Run, call
from tests.sampling import sampled
from tests.tiny import tiny

Fake = Callable[..., None]
SOUND = "import petune\nclass Fake(petune.Tuner[petune.TunerConfig]):\n    def attach(self, edit): pass\n"
SOUND += "    def num_parameters(self, sites): return 0\n"
DRY = ("run", "--method", "adaptformer", "--backbone", "vit_nano", "--weights", "none", "--dataset", "digits",
       "--dry-run", "--set", "backbone_options.depth=1")  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """One way to be broken: the module's code, and the cause that using it must name; empty if it works after all."""

    code: str | None
    cause: str
    target: str = "petune_fake:Fake"
    requires: str = ""
    names: tuple[str, ...] = ("fake",)
    twice: bool = False


KINDS = {
    "import error": Kind("import petune_that_is_not_there", "ModuleNotFoundError"),
    "syntax error": Kind("class Fake(:", "SyntaxError"),
    "missing attribute": Kind("Other = 1", "AttributeError"),
    "exits": Kind("import sys\nsys.exit(7)", "SystemExit: 7"),
    "raises": Kind("raise RuntimeError('boo')", "RuntimeError: boo"),
    "wrong type": Kind("class Fake: pass", "no subclass of petune.Tuner"),
    "name taken twice": Kind(SOUND, "both register the method", twice=True),
    "prints": Kind("print('HELLO')\n" + SOUND, ""),
    "needs a newer petune": Kind(SOUND, "needs petune>=99", requires="petune>=99"),
    "module gone": Kind(None, "ModuleNotFoundError"),
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(tmp_path)

    return functools.partial(call, capture=capfd)


def install(fake: Fake, kind: Kind) -> None:
    fake("petune-fake", {"fake": kind.target}, kind.code, kind.requires)
    if kind.twice:
        fake("petune-rival", {"fake": "petune_fake_rival:Fake"}, SOUND)


@pytest.mark.parametrize("name", sampled(KINDS, {"syntax error", "exits", "name taken twice", "prints"}.__contains__))
def test_other_methods_work_beside_a_broken_plugin(fake: Fake, run: Run, name: str) -> None:
    kind = KINDS[name]
    install(fake, kind)
    assert run("--help").code == 0
    listing = run("methods", "--json")
    assert listing.code == 0
    rows = {row["name"]: row for row in json.loads(listing.out)}
    assert rows["adaptformer"]["state"] == "ok"
    assert rows["fake"]["distribution"] in {"petune-fake", "petune-rival"}
    dry = run(*DRY, "--json")
    assert dry.code == 0, dry.err
    assert json.loads(dry.out)["methods"][0]["method"] == "adaptformer"  # and nothing else on stdout


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_using_a_broken_plugin_names_package_and_cause(fake: Fake, run: Run, kind: Kind) -> None:
    install(fake, kind)
    done = run(*DRY[:2], "fake", *DRY[3:], "--json")
    if not kind.cause:
        assert done.code == 0
        assert "HELLO" not in done.out
        return
    assert done.code == 3
    assert "petune-fake" in done.err
    assert kind.cause in done.err
    assert done.err.count("\n") <= 2, "one message, no traceback"
    table = {row["name"]: row["state"] for row in json.loads(run("methods", "--load", "--json").out)}
    assert table["adaptformer"] == table["vpt"] == "ok"
    assert kind.cause in table["fake"] or kind.twice


def test_all_ten_kinds_at_once(fake: Fake, tmp_path: Path) -> None:
    for number, kind in enumerate(KINDS.values()):
        module = f"petune_fake_{number}"
        fake(f"petune-fake-{number}", {f"fake{number}": f"{module}:Fake"}, kind.code, kind.requires)
    words = [sys.executable, "-m", "petune", "methods"]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ, cwd=tmp_path, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)
    assert all(f"fake{number}" in done.stdout for number in range(10))


def test_plugins_cannot_take_built_in_names(fake: Fake) -> None:
    fake("petune-fake", {"adaptformer": "petune_fake:Fake"}, SOUND)
    assert load_tuner("adaptformer").__module__ == "petune.tuners.adaptformer"
    states = [t.state for t in list_tuners() if t.name == "adaptformer"]
    assert states == ["ok", "unusable: petune has a method 'adaptformer' of its own"]


def test_listing_imports_nothing(fake: Fake) -> None:
    fake("petune-fake", {"fake": "petune_fake:Fake"}, "raise SystemExit")
    assert "fake" in {t.name for t in list_tuners()}
    assert "petune_fake" not in sys.modules


@pytest.mark.parametrize(
    ("allowed", "seen"),
    [(None, {"fake", "other"}), ("none", set()), ("fake", {"fake"}), ("petune-second , x", {"other"}), ("", set())],
)
def test_the_environment_restricts_plugins(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, allowed: str | None, seen: set[str]
) -> None:
    fake("petune-fake", {"fake": "petune_fake:Fake"}, SOUND)
    fake("petune-second", {"other": "petune_fake_second:Fake"}, SOUND)
    if allowed is not None:
        monkeypatch.setenv("PETUNE_PLUGINS", allowed)
    names = {t.name for t in list_tuners()}
    assert {"adaptformer", "linear"} <= names
    assert names & {"fake", "other"} == seen
    if "fake" not in seen:
        with pytest.raises(UnknownName):
            load_tuner("fake")


def test_a_sound_plugin_works(fake: Fake) -> None:
    fake("petune-fake", {"fake": "petune_fake:Fake"}, SOUND)
    assert petune.check_tuner("fake")


def test_ctrl_c_during_an_import_passes_through(fake: Fake) -> None:
    fake("petune-fake", {"fake": "petune_fake:Fake"}, "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        load_tuner("fake")


def test_damaged_metadata_is_survived(fake: Fake, tmp_path: Path) -> None:
    info = tmp_path / "site" / "damaged-1.dist-info"
    info.mkdir()
    (info / "entry_points.txt").write_text("[petune.tuners]\ndamaged = petune_fake:Fake\n")
    record: Any = next(t for t in list_tuners() if t.name == "damaged")
    assert (record.distribution, record.version) == ("?", "?")
    with pytest.raises(PluginError, match="damaged"):
        load_tuner("damaged")


FAILS_IN_ATTACH = SOUND.replace("pass", "edit.sites.blocks[0].width")
FAILS_IN_INIT = SOUND + "    def __init__(self, config=None, **options): 1 / 0\n"


@pytest.mark.parametrize(
    ("code", "message"),
    [(FAILS_IN_ATTACH, "was attached: AttributeError: .*'width'"), (FAILS_IN_INIT, "was made: ZeroDivisionError")],
    ids=["attach", "init"],
)
def test_unexpected_errors_name_the_package(fake: Fake, code: str, message: str) -> None:
    fake("petune-bad", {"bad": "petune_fake_bad:Fake"}, code)
    model = tiny()
    before = list(model.state_dict())
    with pytest.raises(PluginError, match=rf"the method 'bad' of petune-bad 1\.5 failed when it {message}"):
        petune.attach(model, "bad")
    assert list(model.state_dict()) == before


HOOKS = """
import petune
class Fake(petune.Tuner[petune.TunerConfig]):
    def attach(self, edit): edit.train(edit.sites.require_blocks()[0])
    def on_train_start(self, total_steps): raise SystemExit(0)
    def on_step_end(self, step): 1 / 0
    def loss(self, step): raise SystemExit(3)
"""


def test_errors_and_exits_while_training_name_the_package(fake: Fake) -> None:
    fake("petune-bad", {"bad": "petune_fake_bad:Fake"}, HOOKS)
    att = petune.attach(tiny(), "bad")
    for hook in (att.on_train_start, att.on_step_end, att.loss):
        with pytest.raises(PluginError, match=r"the method 'bad' of petune-bad 1\.5 failed when it"):
            hook(1)
