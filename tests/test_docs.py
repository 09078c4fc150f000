"""Examples in README.md and docs/ run, their commands are valid, links resolve, and the site builds."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pages
import pytest
import typer
from PIL import Image

from petune.cli.main import app, main
from tests.sampling import sampled

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LONG_PAGES = {"compare-fairly.md", "first-run.md"}
"""Their examples train for 8 to 10 seconds."""
DRY_RUN_COMMANDS = ("run", "compare", "sweep", "pretrain")


def blocks(page: Path, language: str) -> list[str]:
    """Return the page's examples, except excerpts of a file (marked `<!-- path -->`), which other tests cover."""
    found = re.findall(
        rf"^(<!-- \S+ -->\n)?```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S
    )
    return [code for excerpt, code in found if not excerpt]


PYTHON = [page for page in PAGES if blocks(page, "python")]
COMMANDS = [
    (page, command)
    for page in PAGES
    for block in blocks(page, "console")
    for command in re.findall(r"^\$ (petune .*)$", block.replace("\\\n", " "), flags=re.M)
]


COMMANDS_OF_README = [row for row in COMMANDS if row[0].name == "README.md"]


def _ids(pairs: list[tuple[Path, str]]) -> list[str]:
    return [f"{page.name}-{number}" for number, (page, _) in enumerate(pairs)]


def _images(folder: Path) -> None:
    for split in ("train/cat", "train/dog", "test/cat", "test/dog"):
        (folder / split).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (40, 32), (60 * number, 80, 90)).save(folder / split / f"{number}.png")


DATA_OF_THE_READER = (".csv", "hf:", "wds:", "torchvision:", "video:", "./fields")
"""Datasets in examples that no test has."""


def test_examples_are_found() -> None:
    assert len(PYTHON) >= 1
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize("page", sampled(PYTHON, lambda page: page.name not in LONG_PAGES), ids=lambda page: page.name)
def test_python_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}  # later examples of a page use earlier ones
    for code in blocks(page, "python"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            exec(compile(code, str(page), "exec"), names)


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=_ids(COMMANDS))
def test_commands_have_known_flags(page: Path, command: str) -> None:
    parse(shlex.split(command, comments=True)[1:])


@pytest.mark.parametrize(
    ("page", "command"), sampled(COMMANDS, lambda row: row == COMMANDS_OF_README[0]), ids=_ids(COMMANDS)
)
def test_commands_are_valid(
    page: Path, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    _images(tmp_path / "pets")
    words = shlex.split(command, comments=True)[1:]
    if words[0] not in DRY_RUN_COMMANDS or "--from" in words:  # there is no finished run to continue from
        return parse(words)
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--dry-run"])
    out, err = capsys.readouterr()
    if stopped.value.code == 3 and "needs an optional package" in err:  # only `make faults` installs Ray
        return parse(words)
    if stopped.value.code == 4 and any(name in command for name in DATA_OF_THE_READER):
        return parse(words)
    assert stopped.value.code == 0, f"{page.name}: {command}\n{err}"
    assert out
    return None


def parse(words: list[str]) -> None:
    """Parse a command's flags and arguments, without running it."""
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        name, *words = words
        command = command.commands[name]
    command.make_context(name, words)


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M))
    named = {name for page in PAGES for name in re.findall(r"(?:\$ |`)make ([\w-]+)", page.read_text(encoding="utf-8"))}
    assert {"demo", "quick", "test", "test-all"} <= named <= targets


def test_generated_pages_are_up_to_date() -> None:
    assert pages.stale(pages.pages()) == [], "run: python docs/tools/pages.py"


@pytest.mark.exhaustive
def test_the_site_builds_strictly_and_loads_nothing_from_other_hosts(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings_handlers.python")
    words = ["-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    built = list((tmp_path / "site").rglob("*.html"))
    assert len(built) > 30
    loads = re.compile(r"""<(?:script|img|link|iframe)\b[^>]*\b(?:src|href)=["']?((?:https?:)?//[^"' >]+)""")
    outside = {url for page in built for url in loads.findall(page.read_text(encoding="utf-8"))}
    assert outside == set()


def test_relative_links_resolve() -> None:
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.name}: {target}")
    assert broken == []
