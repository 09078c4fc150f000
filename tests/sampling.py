"""Samples of long tests: `make test` runs a few of their parameters, `make test-all` runs all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def sampled(values: Iterable[Any], keep: Callable[[Any], bool]) -> list[Any]:
    """Mark as `exhaustive` all values but those that `keep` accepts, one of which there must be.

    Args:
        values: A test's parameters; a tuple is one row.
        keep: True for the parameters that `make test` tries.
    """
    rows = [value if isinstance(value, tuple) else (value,) for value in values]
    kept = [keep(row[0] if len(row) == 1 else row) for row in rows]
    assert any(kept), "nothing is left to try"
    marks = [() if chosen else (pytest.mark.exhaustive,) for chosen in kept]
    return [pytest.param(*row, marks=mark) for row, mark in zip(rows, marks, strict=True)]
