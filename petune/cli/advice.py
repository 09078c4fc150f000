"""Advice of an error, for the command that failed: it names only flags that this command has."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
SENTENCE_END = re.compile(r"(?<=[.?!]) (?=[A-Z])")
OTHER_COMMAND = re.compile(r"\bpetune ([a-z]+(?: [a-z]+)?)")
EVERYWHERE = {"--debug", "--help"}
"""Flags of every command."""


def advice_for(program: Any, words: Sequence[str], advice: str) -> str:
    """Return the sentences of `advice` that name no flag that the command lacks; empty if there is none.

    A library does not know which command called it: its advice may name `--weights`, which `petune inspect` lacks.

    Args:
        program: The program's group of commands, as click has it.
        words: The words after `petune`.
        advice: Sentences. After `petune COMMAND`, flags are those of that command.
    """
    own = _flags(program, words)
    if own is None:
        return advice
    return " ".join(s for s in SENTENCE_END.split(advice) if _flags_missing(program, own, s) == set())


def _flags_missing(program: Any, own: set[str], sentence: str) -> set[str]:
    """Return the flags in a sentence that its command lacks: the other command that it names, or else this one."""
    other = OTHER_COMMAND.search(sentence)
    known = _flags(program, other[1].split()) if other else None
    return {*FLAG.findall(sentence)} - (own if known is None else known)


def _flags(program: Any, words: Sequence[str]) -> set[str] | None:
    """Return the flags of the command that words start with; None if they name none."""
    command = program
    for word in words:
        inner = getattr(command, "commands", {})
        if not inner:
            break
        if not word.startswith("-"):
            command = inner.get(word)
        if command is None:
            return None
    return None if command is program else {flag for p in command.params for flag in p.opts} | EVERYWHERE
