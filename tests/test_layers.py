"""The folders of CONTRIBUTING.md: which imports which, no cycles among files, who prints, what is too long."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "petune"
FILES = sorted(ROOT.rglob("*.py"))
LONGEST = 400

ROW = re.compile(r"^\| `(\w+)/` \|.*\| ([^|]+) \|$", re.MULTILINE)


def table() -> dict[str, set[str]]:
    """The table of CONTRIBUTING.md: which folders each may import, and what these may import."""
    rows = dict(ROW.findall((ROOT.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")))
    may: dict[str, set[str]] = {}
    for name, text in rows.items():  # each comes after those that it imports
        others = {*may} - {"tuners"} if text == "all" else {*re.findall(r"\w+", text)} & {*rows, "petune"}
        may[name] = others.union(*(may.get(other, set()) for other in others))
    return may


MAY_IMPORT = table()


def folder_of(file: Path) -> str:
    """The folder of petune/ that holds the file; `petune` for the files of the root."""
    parts = file.relative_to(ROOT).parts
    return parts[0] if len(parts) > 1 else "petune"


def module_of(file: Path) -> str:
    return ".".join(("petune", *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


MODULES = {module_of(file): file for file in FILES}


@dataclass(frozen=True)
class Source:
    """Facts about a file: its docstring, the petune modules that it imports, the functions that it calls."""

    docstring: str | None
    imports: frozenset[str]
    calls: frozenset[str]
    raised: frozenset[str]


@cache
def source_of(file: Path) -> Source:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    nodes = [*ast.walk(tree)]
    calls = {node.func for node in nodes if isinstance(node, ast.Call)}
    raised = {node.exc for node in nodes if isinstance(node, ast.Raise) and node.exc is not None}
    return Source(
        ast.get_docstring(tree),
        frozenset(imports(file, nodes)),
        frozenset(map(ast.unparse, calls)),
        frozenset(map(ast.unparse, raised)),
    )


def imports(file: Path, nodes: list[ast.AST]) -> Iterator[str]:
    """Yield the petune modules that a file imports, inside functions and under TYPE_CHECKING too."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "petune")
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}:{node.lineno} is a relative import; write petune.…"
            source = node.module or ""
            if source.split(".")[0] == "petune":
                inner = [f"{source}.{alias.name}" for alias in node.names]
                yield from (name if name in MODULES else source for name in inner)


def shown(file: Path) -> str:
    return str(file.relative_to(ROOT))


def test_petune_has_twelve_folders_and_all_files_are_found() -> None:
    assert {folder_of(file) for file in FILES} == {*MAY_IMPORT, "petune"}
    assert {shown(file) for file in FILES if folder_of(file) == "petune"} == {"__init__.py", "__main__.py"}
    assert len(FILES) > 100


def test_imports_go_down() -> None:
    upward: dict[str, set[str]] = {}
    for file in FILES:
        folder = folder_of(file)
        targets = {name.split(".")[1] if "." in name else "petune" for name in source_of(file).imports}
        if folder != "petune" and not targets - {folder} <= MAY_IMPORT[folder]:
            upward[shown(file)] = targets - {folder} - MAY_IMPORT[folder]
    assert upward == {}


def test_there_is_no_circle_among_files() -> None:
    graph = {name: {*source_of(file).imports} - {name, "petune"} for name, file in MODULES.items() if name != "petune"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_files_have_a_subject() -> None:
    """A name that says something, and a docstring that says what the file is about."""
    assert [shown(file) for file in FILES if file.stem in {"utils", "util", "common", "helpers", "misc"}] == []
    assert [shown(file) for file in FILES if not source_of(file).docstring] == []


def test_files_stay_short() -> None:
    """Of petune, of its tests and of the plugins."""
    folders = [ROOT, ROOT.parent / "tests", ROOT.parent / "plugins"]
    files = [file for folder in folders for file in folder.rglob("*.py") if "build" not in file.parts]
    lengths = {str(file): len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    assert len(lengths) > 400
    assert {file: length for file, length in lengths.items() if length > LONGEST} == {}


PRINTS = {"print", "exit", "quit", "sys.exit", "sys.stdout.write", "sys.stderr.write", "rich.print"}


def test_only_the_command_line_prints_or_exits() -> None:
    files = [file for file in FILES if folder_of(file) != "cli" and file.name != "__main__.py"]
    assert {shown(file) for file in files if PRINTS & source_of(file).calls} == set()
    assert {shown(file) for file in files for text in source_of(file).raised if "SystemExit" in text} == set()
