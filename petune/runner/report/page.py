"""One HTML page from runs, comparisons, sweeps and pretrainings: a single file, without scripts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from petune.base.files import replace_file
from petune.runner.report.find_runs import find_runs
from petune.runner.report.render import check_output, render
from petune.runner.report.sections import sections_of

GENERATOR = "petune report"


@dataclass(frozen=True)
class Page:
    """Summary of the written page.

    Attributes:
        output, bytes: The file and its size.
        done, unfinished, broken: How many directories in each state it shows.
    """

    output: str
    bytes: int
    done: int
    unfinished: int
    broken: int


def write_page(paths: Sequence[Path], output: Path) -> Page:
    """Write one page of everything below `paths`; an older page is replaced.

    Args:
        paths: Directories of runs, comparisons, sweeps and pretrainings, or directories above them.
        output: The HTML file.

    Raises:
        UsageError: There are no runs, or `output` is some other file.
        CheckpointError: It cannot be written.
    """
    check_output(output, GENERATOR)
    paths = [path if path.name else path.resolve() for path in paths]  # "." has no name for titles
    directories = find_runs(paths)
    states = [directory.state for directory in directories]
    content = render(
        "report.html.jinja",
        GENERATOR,
        title=", ".join(path.name or str(path) for path in paths),
        counts={state: states.count(state) for state in ("done", "unfinished", "broken")},
        sections=sections_of(directories),
        incomplete=[directory for directory in directories if directory.state != "done" or directory.detail],
    )
    replace_file(output, content)
    return Page(str(output), len(content), *(states.count(state) for state in ("done", "unfinished", "broken")))
