"""The house of the design: which room imports which, no circles among files, who prints, what is too long."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "petune"
FILES = sorted(ROOT.rglob("*.py"))
LONGEST = 400

MAY_IMPORT = {
    "base": set(),
    "sites": {"base"},
    "adapters": {"base", "sites"},
    "injector": {"base", "sites", "adapters"},
    "tuners": {"petune"},
    "backbones": {"base", "sites"},
    "data": {"base"},
    "training": {"base", "sites", "adapters", "injector", "data"},
    "runner": {"base", "sites", "adapters", "injector", "data", "training", "backbones"},
    "serving": {"base", "sites", "adapters", "injector", "data", "training", "backbones", "runner"},
    "plugin_dev": {"base", "sites", "adapters", "injector", "data", "training"},
    "cli": {
        "base",
        "sites",
        "adapters",
        "injector",
        "data",
        "training",
        "backbones",
        "runner",
        "serving",
        "plugin_dev",
    },
}


def room_of(file: Path) -> str:
    """The folder of petune/ that holds the file; `petune` for the files of the root."""
    parts = file.relative_to(ROOT).parts
    return parts[0] if len(parts) > 1 else "petune"


def module_of(file: Path) -> str:
    return ".".join(("petune", *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


MODULES = {module_of(file): file for file in FILES}


def imports(file: Path) -> Iterator[str]:
    """Yield the petune modules that a file imports, inside functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
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


def test_petune_has_twelve_rooms_and_all_files_are_found() -> None:
    assert {room_of(file) for file in FILES} == {*MAY_IMPORT, "petune"}
    assert {shown(file) for file in FILES if room_of(file) == "petune"} == {"__init__.py", "__main__.py"}
    assert len(FILES) > 100


@pytest.mark.parametrize("file", [f for f in FILES if room_of(f) != "petune"], ids=shown)
def test_imports_go_down(file: Path) -> None:
    room = room_of(file)
    targets = {name.split(".")[1] if "." in name else "petune" for name in imports(file)}
    assert targets - {room} <= MAY_IMPORT[room]


def test_there_is_no_circle_among_files() -> None:
    graph = {name: {*imports(file)} - {name, "petune"} for name, file in MODULES.items() if name != "petune"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("file", FILES, ids=shown)
def test_files_have_a_subject(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert file.stem not in {"utils", "util", "common", "helpers", "misc"}
    assert ast.get_docstring(ast.parse(text)), "the first line says what the file is about"


def test_files_stay_short() -> None:
    """Of petune, of its tests and of the plugins."""
    folders = [ROOT, ROOT.parent / "tests", ROOT.parent / "plugins"]
    files = [file for folder in folders for file in folder.rglob("*.py") if "build" not in file.parts]
    lengths = {str(file): len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    assert len(lengths) > 400
    assert {file: length for file, length in lengths.items() if length > LONGEST} == {}


PRINTS = {"print", "exit", "quit", "sys.exit", "sys.stdout.write", "sys.stderr.write", "rich.print"}


@pytest.mark.parametrize("file", [f for f in FILES if room_of(f) != "cli" and f.name != "__main__.py"], ids=shown)
def test_only_the_command_line_prints_or_exits(file: Path) -> None:
    nodes = [*ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
    calls = [ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)]
    raised = [ast.unparse(node.exc) for node in nodes if isinstance(node, ast.Raise) and node.exc is not None]
    assert not PRINTS & {*calls}
    assert not [text for text in raised if "SystemExit" in text]
