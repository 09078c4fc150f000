"""Every example of the README and of docs/ runs; every command of them is one that petune takes."""

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

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
CHECKED_DRY = ("run", "compare", "sweep", "pretrain")


def blocks(page: Path, language: str) -> list[str]:
    """The page's examples, but for those cut from a file, which `<!-- path -->` names and another test holds."""
    found = re.findall(
        rf"^(<!-- \S+ -->\n)?```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S
    )
    return [code for cut_from, code in found if not cut_from]


PYTHON = [page for page in PAGES if blocks(page, "python")]
COMMANDS = [
    (page, command)
    for page in PAGES
    for block in blocks(page, "console")
    for command in re.findall(r"^\$ (petune .*)$", block.replace("\\\n", " "), flags=re.M)
]


def _ids(pairs: list[tuple[Path, str]]) -> list[str]:
    return [f"{page.name}-{number}" for number, (page, _) in enumerate(pairs)]


def _images(folder: Path) -> None:
    for place in ("train/cat", "train/dog", "test/cat", "test/dog"):
        (folder / place).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (40, 32), (60 * number, 80, 90)).save(folder / place / f"{number}.png")


def test_there_are_examples() -> None:
    assert len(PYTHON) >= 1
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize("page", PYTHON, ids=lambda page: page.name)
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}  # a page's examples build on one another
    for code in blocks(page, "python"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            exec(compile(code, str(page), "exec"), names)


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=_ids(COMMANDS))
def test_commands_are_taken(
    page: Path, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    _images(tmp_path / "pets")
    words = shlex.split(command, comments=True)[1:]
    if words[0] not in CHECKED_DRY:
        return taken(words)
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--dry-run"])
    out, err = capsys.readouterr()
    if stopped.value.code == 3 and "needs an optional package" in err:  # Ray is in no set-up but that of `make faults`
        return taken(words)
    assert stopped.value.code == 0, f"{page.name}: {command}\n{err}"
    assert out
    return None


def taken(words: list[str]) -> None:
    """Raises what the program would say of the command's flags and arguments; nothing is run."""
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        name, *words = words
        command = command.commands[name]
    command.make_context(name, words)


def test_generated_pages_are_fresh() -> None:
    assert pages.stale(pages.pages()) == [], "run: python docs/tools/pages.py"


def test_the_site_is_built_strictly_and_asks_nobody(tmp_path: Path) -> None:
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


def test_links_lead_somewhere() -> None:
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.name}: {target}")
    assert broken == []
