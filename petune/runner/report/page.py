"""One HTML page from runs, comparisons, sweeps and pretrainings: a single file, without scripts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup, escape

from petune.base.errors import UsageError
from petune.base.files import replace_file
from petune.base.text import printable
from petune.runner.report.find_runs import find_runs
from petune.runner.report.sections import sections_of

GENERATOR = '<meta name="generator" content="petune report">'
"""Tells a page that may be replaced from any other file."""
TEMPLATES = Path(__file__).parent


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
    _check_output(output)
    directories = find_runs(paths)
    states = [directory.state for directory in directories]
    text = _render(
        title=", ".join(path.name or str(path) for path in paths),
        counts={state: states.count(state) for state in ("done", "unfinished", "broken")},
        sections=sections_of(directories),
        incomplete=[directory for directory in directories if directory.state != "done"],
    )
    content = text.encode("utf-8", errors="replace")  # file names need not be UTF-8
    replace_file(output, content)
    return Page(str(output), len(content), *(states.count(state) for state in ("done", "unfinished", "broken")))


def _check_output(output: Path) -> None:
    try:
        replaceable = not output.exists() or GENERATOR.encode() in output.read_bytes()[:2000]
    except OSError as error:
        raise UsageError(f"cannot read {output}: {error.strerror}. Name a file for the report") from None
    if not replaceable:
        raise UsageError(
            f"{output} exists and is not a page of `petune report`. Name another file",
            cli_hint="Use --output FILE",
        )
    if not output.parent.is_dir():
        raise UsageError(f"no such directory: {output.parent}")


def _breakable(method: str) -> Markup:
    """Let a browser break a long method between its options: `vpt:` `deep=false,` `num_prompts=10`."""
    escaped = str(escape(printable(method)))
    return Markup(escaped.replace(":", ":<wbr>").replace(",", ",<wbr>"))


def _render(**values: object) -> str:
    from importlib.metadata import version

    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    environment.filters["breakable"] = _breakable
    template = environment.get_template("report.html.jinja")
    return template.render(**values, generator=Markup(GENERATOR), version=version("petune"))
