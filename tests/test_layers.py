"""The layers of design.md, held by walking the syntax trees: who imports whom, who prints, what is long."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "petune"
FILES = sorted(ROOT.rglob("*.py"))

LEVELS = {
    "errors": 0, "config": 0, "files": 0, "network": 0, "arguments": 0, "group": 0, "text": 0,
    "sites": 1, "anatomy": 1, "rundir": 1, "results": 1, "counts": 1, "tiny_models": 1, "space": 1,
    "edit": 2, "hooks": 2, "ledger": 2, "probe": 2, "tuner": 2, "registry": 2, "card": 2, "passing": 2,
    "attach": 3, "attachment": 3, "behaviour": 3, "fingerprint": 3, "state": 3, "testing": 3, "tuners": 3,
    "backbones": 4, "foreign": 4, "weights": 4, "hub": 4, "data": 4, "pytest_plugin": 4, "scaffold": 4, "tasks": 4,
    "peft_method": 4, "timm_repository": 4,
    "began": 5, "train": 5, "measure": 5, "restore": 5, "share": 5,
    "export": 6, "predict": 6, "run": 6, "pretrain": 6,
    "compare": 7, "report": 7, "page": 7, "evaluation": 7, "sweep": 7, "trials": 7, "executors": 7, "demo": 7,
    "cli": 8,
    "peft_hook": 9, "__main__": 9,
}  # fmt: skip

SIBLINGS = {
    ("config", "errors"): "a configuration's problems are errors",
    ("files", "errors"): "so are a disk's",
    ("arguments", "errors"): "and a call's",
    ("group", "errors"): "one process's error is everybody's",
    ("anatomy", "sites"): "the walk returns them",
    ("results", "rundir"): "the name of the result's file",
    ("edit", "hooks"): "the verbs are built on them",
    ("edit", "passing"): "prompts that go from attention to attention",
    ("passing", "hooks"): "they are prompts inside an attention, but for the way between",
    ("edit", "ledger"): "what other attachments added is not the backbone's",
    ("edit", "probe"): "which layers a site calls",
    ("tuner", "edit"): "a type only",
    ("registry", "tuner"): "what it builds",
    ("attach", "attachment"): "what it returns",
    ("attachment", "state"): "Attachment.save",
    ("fingerprint", "attachment"): "of the backbone under an attachment",
    ("behaviour", "attachment"): "what the model computes with one",
    ("state", "behaviour"): "saved, and compared where it is loaded",
    ("state", "fingerprint"): "saved, and compared where it is loaded",
    ("state", "attach"): "load attaches first",
    ("state", "attachment"): "and save describes one",
    ("testing", "attach"): "the contract is about attaching",
    ("testing", "attachment"): "about switching and folding",
    ("testing", "state"): "and about saving",
    ("backbones", "weights"): "a backbone has weights",
    ("backbones", "foreign"): "some are not timm's",
    ("backbones", "hub"): "and may have to fetch them",
    ("foreign", "hub"): "as others have",
    ("foreign", "timm_repository"): "hf: names both libraries' models",
    ("timm_repository", "hub"): "and its weights are fetched, too",
    ("pretrain", "run"): "a pretraining run is a run with other defaults",
    ("sweep", "compare"): "the event that a run begins",
    ("compare", "report"): "many runs, one table",
    ("compare", "executors"): "which are done somewhere",
    ("sweep", "executors"): "which are done somewhere, as runs are",
    ("export", "predict"): "what becomes of an image first",
    ("share", "restore"): "which code an adapter would have run",
    ("page", "compare"): "what a comparison wrote",
    ("page", "report"): "its cells, beside others",
    ("sweep", "trials"): "what it asks for and keeps",
    ("page", "trials"): "what a sweep wrote",
}
PUBLIC_ONLY = {"tuners"}  # written against `petune` itself, as a plugin is
LONGEST = 400
MAY_PRINT = {"cli"}


def _module(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def _imports(file: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import of petune in the file, those inside functions included."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}:{node.lineno} is a relative import; write petune.…"
            module = node.module or ""
            if module == "petune":
                known = {alias.name for alias in node.names} & LEVELS.keys()
                yield from ((node.lineno, f"petune.{name}") for name in known)
                if len(known) < len(node.names):
                    yield node.lineno, "petune"
            elif module.startswith("petune."):
                yield node.lineno, module
        elif isinstance(node, ast.Import):
            names = (alias.name for alias in node.names)
            yield from ((node.lineno, name) for name in names if name.split(".")[0] == "petune")


def _forbidden(importer: str, imported: str) -> str | None:
    if importer in PUBLIC_ONLY:
        inside = imported == "petune" or imported.startswith(f"petune.{importer}")
        return None if inside else "built-ins are written against public petune names only"
    if imported == "petune":
        return "only the built-in tuners go through the public names"
    target = imported.split(".")[1]
    if target not in LEVELS:
        return "it has no level"
    if target == importer or LEVELS[target] < LEVELS[importer] or (importer, target) in SIBLINGS:
        return None
    return f"level {LEVELS[importer]} may not import level {LEVELS[target]}"


def _shown(file: Path) -> str:
    return str(file.relative_to(ROOT))


def test_the_files_are_found() -> None:
    assert len(FILES) > 30
    assert {"run.py", "data/cifar.py", "train/loop.py"} <= {_shown(file) for file in FILES}


def test_every_module_has_a_level_and_every_level_a_module() -> None:
    modules = {_module(file) for file in FILES} - {"__init__"}
    assert modules == set(LEVELS)


@pytest.mark.parametrize("file", FILES, ids=_shown)
def test_imports_go_down(file: Path) -> None:
    importer = _module(file)
    if importer == "__init__":
        return  # the public names come from every level
    reasons = [(line, name, _forbidden(importer, name)) for line, name in _imports(file)]
    assert [reason for reason in reasons if reason[2]] == []


def test_every_exception_among_siblings_is_needed_and_of_one_level() -> None:
    used = {(_module(f), name.split(".")[1]) for f in FILES for _, name in _imports(f) if name != "petune"}
    assert set(SIBLINGS) <= used
    assert all(LEVELS[a] == LEVELS[b] for a, b in SIBLINGS)


@pytest.mark.parametrize("file", FILES, ids=_shown)
def test_files_stay_short_and_have_a_subject(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST
    assert file.stem not in {"utils", "util", "common", "helpers", "misc"}
    assert ast.get_docstring(ast.parse(text)), "the first line says what the file is about"


@pytest.mark.parametrize("file", [f for f in FILES if _module(f) not in {*MAY_PRINT, "__main__"}], ids=_shown)
def test_only_the_command_line_prints_or_exits(file: Path) -> None:
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in {
                "print",
                "exit",
                "quit",
                "sys.exit",
                "sys.stdout.write",
                "sys.stderr.write",
                "rich.print",
            }:
                found.append(f"{called} in line {node.lineno}")
        elif isinstance(node, ast.Raise) and node.exc is not None and "SystemExit" in ast.unparse(node.exc):
            found.append(f"SystemExit in line {node.lineno}")
    assert found == []


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("run", "petune.train.loop", True),
        ("train", "petune.run", False),
        ("data", "petune.data.cache", True),
        ("data", "petune.backbones", False),
        ("tuners", "petune", True),
        ("tuners", "petune.edit", False),
        ("attach", "petune", False),
        ("cli", "petune.nowhere", False),
    ],
)
def test_the_rule_itself(importer: str, imported: str, allowed: bool) -> None:
    assert (_forbidden(importer, imported) is None) == allowed
