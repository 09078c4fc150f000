"""Advice of errors names only flags that the command has, whichever command meets the error."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import petune as public
from petune.base.errors import UsageError
from petune.cli.advice import advice_for
from petune.cli.main import app

Run = Callable[..., Any]

ROOT = Path(public.__file__).parent
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
PROGRAM: Any = typer.main.get_command(app)
COMMANDS = {
    (name, *inner): command
    for name, group in PROGRAM.commands.items()
    for inner, command in (
        [((), group)] if not hasattr(group, "commands") else [((k,), c) for k, c in group.commands.items()]
    )
}
FLAGS = {
    words: {flag for param in command.params for flag in param.opts} | {"--debug", "--help"}
    for words, command in COMMANDS.items()
}


def texts(file: Path) -> Iterator[str]:
    """Yield the string literals of a file that name flags, without docstrings; values in f-strings become `x`."""
    source = file.read_text(encoding="utf-8")
    if not FLAG.search(source):
        return
    tree = ast.parse(source)
    statements = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            text = "".join(str(v.value) if isinstance(v, ast.Constant) else "x" for v in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in statements | parts:
            text = node.value
        else:
            continue
        if FLAG.search(text):
            yield text


LIBRARY = [file for file in ROOT.rglob("*.py") if file.parent != ROOT / "cli"]
OF_GIT = {"--show-toplevel", "--porcelain"}


def test_a_hint_is_printed_by_the_commands_that_have_its_flags_and_by_no_other() -> None:
    hints = sorted({text for file in LIBRARY for text in texts(file)} - OF_GIT)
    assert len(hints) > 25
    assert len(COMMANDS) > 18
    for hint in hints:
        printed = {words: advice_for(PROGRAM, words, hint) for words in COMMANDS}
        for words, text in printed.items():
            if "petune " not in text:
                assert {*FLAG.findall(text)} <= FLAGS[words], (hint, words)
        assert hint in printed.values(), f"no command has all these flags: {hint}"


def test_a_command_names_only_its_own_flags() -> None:
    files = {words: ROOT / "cli" / f"{words[0]}.py" for words in COMMANDS if len(words) == 1}
    own = {words: [*texts(file)] for words, file in files.items() if file.exists()}
    assert len(own) > 10
    for words, found in own.items():
        known = [text for text in found if not FLAG.match(text)]
        assert [text for text in known if advice_for(PROGRAM, words, text) != text] == [], words


def test_flags_after_another_command_are_those_of_that_command() -> None:
    assert advice_for(PROGRAM, ["predict"], "Try petune run --lr 1") != ""
    assert advice_for(PROGRAM, ["run"], "Try petune predict --lr 1") == ""
    assert advice_for(PROGRAM, ["--debug", "inspect"], "Set it with --lr. See --debug") == "See --debug"


@pytest.mark.parametrize(
    ("command", "printed"), [("run", True), ("inspect", False), ("predict", False), ("env", False)]
)
def test_the_program_leaves_out_advice_that_its_command_cannot_follow(
    command: str, printed: bool, petune: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fail_with(monkeypatch, UsageError("lr is 0", cli_hint="Set it with --lr"))
    done = petune(command)
    assert done.err == f"error: lr is 0{'. Set it with --lr' if printed else ''}\n"


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_advice_for_less_memory_fits_the_command(
    words: tuple[str, ...], petune: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fail_with(monkeypatch, MemoryError())
    done = petune(*words)
    assert done.code == 1
    assert {*FLAG.findall(done.err)} <= FLAGS[words]
    assert ("batch" in done.err) == ("--batch-size" in FLAGS[words])


def test_inspect_does_not_advise_weights(petune: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    inspected = petune("inspect", "--backbone", "hf:nope/x")
    assert inspected.code == 4
    assert "hf:nope/x" in inspected.err
    assert "weights" not in inspected.err.replace("weights of", "")


def _fail_with(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Make every command raise `error`."""

    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr("petune.cli.help.Command.parse_args", fail)
