"""The words of the design: none of the retired ones is a name in the code, a flag, a file or a word for users."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
READS_OLD_FILES = {"migrations", "test_migrations", "peft_type"}
"""Files of these names hold old keys, since they read what older versions wrote."""

NAMES = {
    *("picture", "pictures", "began", "held", "claimed", "hold_config", "free_path", "ledger", "claim"),
    *("bequeath", "beneath", "behaviour", "moved_by", "adopt", "wake", "unread", "linears", "readers", "passage"),
    *("stepped", "identity_at_start", "pack", "savings", "heap", "passing", "leg", "thought", "foreign"),
    *("led", "in_turn", "agree", "extra_loss", "train_per_class", "trust_code", "at_once"),
}
TEXTS = re.compile(
    r"\bpictures?\b|\bledger\b|\bbequeath|\bbehaviour\b|--(over|at-once|trust-code|track|train-per-class)(?![\w-])"
    r"|\b(compare\.yaml|pictures\.json|began\.json)\b|\bvariant[=:] ?seed\b|\bvit_seed\b",
    re.IGNORECASE,
)
CODE = sorted(f for folder in ("petune", "plugins", "benchmarks", "examples") for f in (ROOT / folder).rglob("*.py"))
PAGES = [f for f in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")) if f.is_file()]
TEMPLATES = sorted(f for f in (ROOT / "petune").rglob("*") if f.suffix in {".jinja", ".tmpl"})


def shown(file: Path) -> str:
    return str(file.relative_to(ROOT))


@cache
def names_and_docstrings(file: Path) -> tuple[set[str], list[str]]:
    """The names that a file gives to something, in lower case without underscores, and its docstrings."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    docstrings = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
    return {name.strip("_").lower() for name in names_in(tree)}, docstrings


def names_in(tree: ast.AST) -> Iterator[str]:
    """Yield every name that the code gives to something: functions, classes, arguments, variables, attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def test_there_is_something_to_check() -> None:
    assert len(CODE) > 150
    assert len(PAGES) > 20
    assert len(TEMPLATES) >= 4


def test_no_name_is_a_retired_word() -> None:
    files = [file for file in CODE if file.stem not in READS_OLD_FILES]
    found = {shown(file): names_and_docstrings(file)[0] & NAMES for file in files}
    assert {file: names for file, names in found.items() if names} == {}


def test_no_text_says_a_retired_word() -> None:
    files = [file for file in (*CODE, *PAGES, *TEMPLATES) if file.stem not in READS_OLD_FILES]
    texts = {shown(file): file.read_text(encoding="utf-8") for file in files}
    found = {file: [line for line in text.splitlines() if TEXTS.search(line)] for file, text in texts.items()}
    assert {file: lines for file, lines in found.items() if lines} == {}


def test_docstrings_open_with_a_verb_or_a_noun() -> None:
    wrong = {"What", "Whether", "Of", "Where", "How", "That", "Those", "Why"}
    found = {shown(file): {text.split(" ")[0] for text in names_and_docstrings(file)[1]} & wrong for file in CODE}
    assert {file: words for file, words in found.items() if words} == {}
