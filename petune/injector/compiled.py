"""Let compiled code notice an attachment."""

from __future__ import annotations

import sys


def forget_compiled_code() -> None:
    """Drop what `torch.compile` has compiled so far, so that the next call compiles it again, with the new adapters.

    Compiled code checks that its inputs, parameters and modules are those it was compiled for, but by default not
    their hooks, so it would ignore an adapter without a word. Which models a piece of code runs is not known, so all
    of it is dropped. Nothing is imported: torch._dynamo takes a second, and without it nothing is compiled.
    """
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()
