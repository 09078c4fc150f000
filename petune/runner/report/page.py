"""One HTML page from runs, comparisons, sweeps and pretrainings: whole in one file, without scripts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from petune.base.errors import UsageError
from petune.base.files import replace_file
from petune.runner.report.find_runs import find
from petune.runner.report.sections import sections_of

MARK = '<meta name="generator" content="petune report">'
"""What tells a page of ours, which may be written anew, from a file that may not."""
TEMPLATES = Path(__file__).parent


@dataclass(frozen=True)
class Page:
    """What was written: where, how many bytes, and how many directories of each state are in it."""

    output: str
    bytes: int
    done: int
    unfinished: int
    broken: int


def write_page(paths: Sequence[Path], output: Path) -> Page:
    """Write one page of everything that is found below `paths`; an older page of ours is replaced.

    Args:
        paths: Directories of runs, comparisons, sweeps and pretrainings, or directories above such.
        output: The HTML file.

    Raises:
        UsageError: Nothing is found, or `output` is something else than such a page.
        CheckpointError: It cannot be written.
    """
    _refuse_foreign(output)
    found = find(paths)
    states = [one.state for one in found]
    text = _render(
        title=", ".join(path.name or str(path) for path in paths),
        counts={state: states.count(state) for state in ("done", "unfinished", "broken")},
        sections=sections_of(found),
        incomplete=[one for one in found if one.state != "done"],
    )
    content = text.encode("utf-8", errors="replace")  # file names need not be UTF-8
    replace_file(output, content)
    return Page(str(output), len(content), *(states.count(state) for state in ("done", "unfinished", "broken")))


def _refuse_foreign(output: Path) -> None:
    try:
        ours = not output.exists() or MARK.encode() in output.read_bytes()[:2000]
    except OSError as error:
        raise UsageError(f"--output must be a file, but {output} cannot be read: {error.strerror}") from None
    if not ours:
        raise UsageError(f"{output} exists and is no page of `petune report`; it is left alone. Name another --output")
    if not output.parent.is_dir():
        raise UsageError(f"--output must lie in a directory that exists, but there is no {output.parent}")


def _render(**values: object) -> str:
    from importlib.metadata import version

    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from petune.base.text import printable

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, finalize=lambda value: printable(value) if type(value) is str else value,
    )  # fmt: skip
    return environment.get_template("report.html.jinja").render(**values, mark=MARK, version=version("petune"))
