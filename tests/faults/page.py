"""docs/reliability.md: the text of page.md around a table of what was tried, kept from run to run."""

from __future__ import annotations

import fcntl
import platform
import re
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "reliability.md"


class Row(NamedTuple):
    """A line of the table; `test` is `file.py::name`, as pytest has it."""

    fault: str
    expected: str
    held: str
    test: str


def write_page(tally: Iterable[Row], ran: Iterable[str]) -> None:
    """Put the rows of this session in place of what the same tests yielded before; other tests' rows stay."""
    again = {*ran}
    with (HERE / "page.md").open() as lock:  # parts may run at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        _write(tally, again)


def _write(tally: Iterable[Row], again: set[str]) -> None:
    kept = [row for row in read_rows(PAGE.read_text()) if row.test not in again and exists(row.test)]
    rows = "\n".join(f"| {' | '.join(row)} |" for row in sorted([*kept, *tally]))
    text = (HERE / "page.md").read_text()
    PAGE.write_text(text.replace("ROWS", rows).replace("MACHINE", machine()))


def read_rows(page: str) -> Iterator[Row]:
    """The rows that a page holds already."""
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if len(cells) == 4 and re.fullmatch(r"test_\w+\.py::.+", cells[3]):
            yield Row(*cells)


def exists(test: str) -> bool:
    """Whether there still is such a test."""
    file, _, name = test.partition("::")
    function = name.partition("[")[0]
    return (HERE / file).exists() and f"def {function}(" in (HERE / file).read_text()


def machine() -> str:
    """Where and with what the last rows were made."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=HERE.parents[1], capture_output=True, text=True).stdout.strip()

    commit = git("rev-parse", "--short", "HEAD") + ("-dirty" if git("status", "--porcelain", "petune", "tests") else "")
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    cpu = found.group(1) if found else platform.processor()
    return f"{cpu}, Python {platform.python_version()}, torch {torch.__version__}, commit {commit}"
