"""Describe tuners from the docstrings in their source files, without importing them.

The docstring of a tuner's class starts with a line that says what the method does. Below it, a line of text names the
paper, `(Author et al., VENUE 2022, arXiv 2205.13535)`, and a paragraph `Trains:` what trains.
"""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import dataclass
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

from petune.base.plugins import PluginRecord


@dataclass(frozen=True)
class TunerDescription:
    """A tuner's description of itself; unknown fields are empty.

    Attributes:
        summary: What the method does, in one line.
        trains: What trains, in one sentence.
        paper: Authors, venue and year.
        arxiv: The paper's arXiv id.
    """

    summary: str = ""
    trains: str = ""
    paper: str = ""
    arxiv: str = ""


def describe_tuner(record: PluginRecord) -> TunerDescription:
    """Describe a registered tuner.

    A plugin whose source file is not found, or says nothing, is described by its package's own summary.
    """
    module, _, cls = record.target.partition(":")
    description = parse_docstring(_docstring_of(module, cls))
    return description if description.summary else TunerDescription(summary=record.package_summary)


def parse_docstring(docstring: str) -> TunerDescription:
    """Read the description out of the docstring of a tuner's class."""
    summary, _, rest = docstring.partition("\n\n")
    trains = re.search(r"^Trains: (.+?)(?:\.(?:\s|$)|;|\n\n|\Z)", rest, re.MULTILINE | re.DOTALL)
    paper = re.search(r"\(([^()]+?),\s+arXiv\s+(\d{4}\.\d{4,5})[^()]*\)", rest)
    return TunerDescription(
        summary=_one_line(summary).removesuffix("."),
        trains=_one_line(trains[1]) if trains else "",
        paper=_one_line(paper[1]) if paper else "",
        arxiv=paper[2] if paper else "",
    )


def _docstring_of(module: str, cls: str) -> str:
    file = _source_file(module)
    if file is None:
        return ""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return ""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == cls:
            return inspect.cleandoc(ast.get_docstring(node) or "")
    return ""


def _source_file(module: str) -> Path | None:
    """Find the file of a module without importing it, or the packages that it is in."""
    top, *inner = module.split(".")
    try:
        spec = find_spec(top)
    except (ImportError, ValueError):
        return None
    for part in inner:
        folders = None if spec is None else spec.submodule_search_locations
        spec = PathFinder.find_spec(part, list(folders)) if folders else None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    return Path(spec.origin)


def _one_line(text: str) -> str:
    return " ".join(text.split())
