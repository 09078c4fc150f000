"""Render HTML pages: single files, without scripts, that load nothing."""

from __future__ import annotations

from pathlib import Path

from markupsafe import Markup, escape

from petune.base.errors import UsageError
from petune.base.text import printable

TEMPLATES = Path(__file__).parent


def render(template: str, generator: str, **values: object) -> bytes:
    """Return a page.

    Args:
        template: Name of the template.
        generator: Command that makes the page, such as `petune report`; see `check_output`.
        values: Of the template.
    """
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
    page = environment.get_template(template)
    text = page.render(**values, generator=Markup(_mark(generator)), version=version("petune"))
    return text.encode("utf-8", errors="replace")  # file names need not be UTF-8


def check_output(output: Path, generator: str) -> None:
    """Check that a page may be written to a file: a new one, or an older page of the same command.

    Raises:
        UsageError: It is some other file, or its directory does not exist.
    """
    try:
        replaceable = not output.exists() or _mark(generator).encode() in output.read_bytes()[:2000]
    except OSError as error:
        raise UsageError(f"cannot read {output}: {error.strerror}. Name a file for the page") from None
    if not replaceable:
        raise UsageError(
            f"{output} exists and is not a page of `{generator}`. Name another file",
            cli_hint="Use --output FILE",
        )
    if not output.parent.is_dir():
        raise UsageError(f"no such directory: {output.parent}")


def _mark(generator: str) -> str:
    return f'<meta name="generator" content="{generator}">'


def _breakable(method: str) -> Markup:
    """Let a browser break a long method between its options: `vpt:` `deep=false,` `num_prompts=10`."""
    escaped = str(escape(printable(method)))
    return Markup(escaped.replace(":", ":<wbr>").replace(",", ",<wbr>"))
