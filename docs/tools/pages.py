"""Write the generated pages of the site from the code, or check that they are up to date.

python docs/tools/pages.py           # docs/methods/, docs/cli.md, docs/api.md
python docs/tools/pages.py --check   # exit code 1 if one is out of date; `make test` runs this
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(DOCS.parent), str(Path(__file__).parent)]

from method_pages import NAMES, index_page, method_page  # noqa: E402

import petune  # noqa: E402

GENERATED = "<!-- written by docs/tools/pages.py -->\n"
HELP_WIDTH = 100


def pages() -> dict[Path, str]:
    """Return every generated page by its path below docs/."""
    texts = {Path("methods") / f"{name}.md": method_page(name) for name in NAMES}
    texts |= {Path("methods/index.md"): index_page(), Path("cli.md"): cli_page(), Path("api.md"): api_page()}
    return {path: f"{GENERATED}\n{text.strip()}\n" for path, text in texts.items()}


def cli_page() -> str:
    """Return the output of `petune COMMAND --help` for every command."""
    import typer

    from petune.cli.main import app

    program = typer.main.get_command(app)
    parts = ["# Command line", _help(program, "petune")]
    for name, command in _commands(program, "petune"):
        parts += [f"## {name}", _help(command, name)]
    return "\n\n".join(parts)


def api_page() -> str:
    """Return a page with every public name, for mkdocstrings to fill in."""
    lines = ["# Python", "", "What `import petune` offers. Everything else may change without notice."]
    for name in sorted(petune.__all__, key=str.lower):
        lines += ["", f"::: {getattr(petune, name).__module__}.{name}"]
    return "\n".join(lines)


def stale(made: Mapping[Path, str]) -> list[Path]:
    """Return the pages that differ from those on disk, and those that should not exist."""
    different = [p for p in made if not (DOCS / p).exists() or (DOCS / p).read_text(encoding="utf-8") != made[p]]
    on_disk = [Path("methods") / file.name for file in (DOCS / "methods").glob("*.md")]
    return [*different, *(path for path in on_disk if path not in made)]


def main(check: bool) -> int:
    """Write every page, or check them."""
    made = pages()
    for path in stale(made):
        if check:
            print(f"docs/{path} is out of date. Run: python docs/tools/pages.py", file=sys.stderr)
        elif path in made:
            (DOCS / path).parent.mkdir(exist_ok=True)
            (DOCS / path).write_text(made[path], encoding="utf-8")
        else:
            (DOCS / path).unlink()
    return 1 if check and stale(made) else 0


def _commands(group: Any, name: str) -> Iterator[tuple[str, Any]]:
    for key, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{name} {key}")
        else:
            yield f"{name} {key}", command


def _help(command: Any, name: str) -> str:
    from petune.cli.main import app

    names = app.info.context_settings["help_option_names"]
    context = command.context_class(
        command, info_name=name, terminal_width=HELP_WIDTH, max_content_width=HELP_WIDTH, help_option_names=names
    )
    return f"```text\n{command.get_help(context).strip()}\n```"


if __name__ == "__main__":
    raise SystemExit(main("--check" in sys.argv[1:]))
