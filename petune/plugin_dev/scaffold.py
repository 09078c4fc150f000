"""Write the files of a new plugin, from the templates next to this file."""

from __future__ import annotations

import keyword
import re
from pathlib import Path
from typing import Literal

from petune.base.entry_points import PluginKind, registered_plugins
from petune.base.errors import UsageError
from petune.data.registry import DATASETS
from petune.injector.registry import TUNERS
from petune.training.task_registry import TASKS

Kind = Literal["tuner", "dataset", "task"]
KINDS: dict[Kind, PluginKind] = {"tuner": TUNERS, "dataset": DATASETS, "task": TASKS}
TEMPLATES = Path(__file__).with_name("templates")
FILES = {
    "pyproject.toml": "pyproject.toml.tmpl",
    "README.md": "README.md.tmpl",
    "petune_NAME.py": "module.py.tmpl",
    "tests/test_NAME.py": "test.py.tmpl",
}


def write_plugin(name: str, parent: Path, kind: Kind = "tuner") -> list[Path]:
    """Write the plugin `petune-NAME` into a new directory of that name.

    Args:
        name: The name of the method, dataset or task: lowercase letters, digits and underscores.
        parent: An existing directory.
        kind: What the plugin is.

    Returns:
        The files.

    Raises:
        UsageError: The name is not possible or taken, or the directory exists.
    """
    _check_name(name, KINDS[kind])
    root = parent / f"petune-{name.replace('_', '-')}"
    words = {
        "NAME": name,
        "DISTRIBUTION": root.name,
        "CLASS": "".join(word.capitalize() for word in name.split("_")),
    }
    try:
        root.mkdir()
        return [_write(root / _fill(path, words), f"{kind}/{template}", words) for path, template in FILES.items()]
    except FileExistsError:
        raise UsageError(f"{root} exists already. Choose another name, or remove it") from None
    except OSError as error:
        raise UsageError(f"cannot write {root}: {error.strerror}") from None


def _check_name(name: str, kind: PluginKind) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name):
        raise UsageError(f"{name!r} is no name for a {kind.noun}. Use lowercase letters, digits and single underscores")
    known = {plugin.name for plugin in registered_plugins(kind) if plugin.is_own}
    if name in known or keyword.iskeyword(name) or keyword.iskeyword(name.capitalize()):
        owner = f"a {kind.noun} of petune" if name in known else "a keyword of Python"
        raise UsageError(f"{name} is {owner}. Choose another name")


def _write(path: Path, template: str, words: dict[str, str]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(_fill((TEMPLATES / template).read_text(encoding="utf-8"), words), encoding="utf-8")
    return path


def _fill(text: str, words: dict[str, str]) -> str:
    return re.sub("|".join(words), lambda match: words[match[0]], text)
