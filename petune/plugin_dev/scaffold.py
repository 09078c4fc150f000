"""The files of a new plugin, from the templates beside this file."""

from __future__ import annotations

import keyword
import re
from pathlib import Path

from petune.base.errors import UsageError
from petune.injector.registry import list_tuners

TEMPLATES = Path(__file__).with_name("templates")
FILES = {
    "pyproject.toml": "pyproject.toml.tmpl",
    "README.md": "README.md.tmpl",
    "petune_NAME.py": "module.py.tmpl",
    "tests/test_NAME.py": "test.py.tmpl",
}


def write_plugin(name: str, place: Path) -> list[Path]:
    """Write the plugin `petune-NAME` as the directory of that name in `place`.

    Args:
        name: The method's name: small letters, digits and underscores.
        place: An existing directory.

    Returns:
        The files.

    Raises:
        UsageError: The name cannot be one, or the directory exists.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name):
        raise UsageError(f"a method's name must be small letters, digits and single underscores, but is {name!r}")
    known = {record.name for record in list_tuners() if record.is_own}
    if name in known or keyword.iskeyword(name) or keyword.iskeyword(name.capitalize()):
        why = "a method of petune's own" if name in known else "a word of Python"
        raise UsageError(f"a method needs a name of its own, but {name} is {why}; choose another")
    root = place / f"petune-{name.replace('_', '-')}"
    words = {
        "NAME": name,
        "DISTRIBUTION": root.name,
        "CLASS": "".join(word.capitalize() for word in name.split("_")),
    }
    try:
        root.mkdir()
        written = [_write(root / _fill(path, words), template, words) for path, template in FILES.items()]
    except FileExistsError:
        raise UsageError(f"{root} exists already; choose another name, or remove it") from None
    except OSError as error:
        raise UsageError(f"{root} cannot be written: {error.strerror}") from None
    return written


def _write(path: Path, template: str, words: dict[str, str]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(_fill((TEMPLATES / template).read_text(encoding="utf-8"), words), encoding="utf-8")
    return path


def _fill(text: str, words: dict[str, str]) -> str:
    return re.sub("|".join(words), lambda found: words[found[0]], text)
