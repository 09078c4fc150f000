"""The program in this process: `call("run", "--epochs", 2, capture=capsys)` and what it left."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from petune.cli.main import main


@dataclass(frozen=True)
class Done:
    """What a command left: exit code, stdout, stderr."""

    code: object
    out: str
    err: str


Run = Callable[..., Done]


def call(*words: object, capture: pytest.CaptureFixture[str]) -> Done:
    """Run `petune WORDS`; what was captured before is dropped."""
    capture.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in words])
    return Done(stopped.value.code, *capture.readouterr())
