"""Plain data from YAML files, from values on the command line and from `a.b=c` overrides."""

from __future__ import annotations

import datetime
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from petune.base.errors import ConfigError

MERGE = "<<"
MISREAD = re.compile(r"[-+]?0[0-9_]+|[-+]?[0-9][0-9_]*(:[0-9.]+)+|(?![\[{'\"]).*(?<!\S)#.*", re.DOTALL)
"""What YAML 1.1 reads otherwise than it is meant: 010 as 8, 1:30 as 90, and text only up to a comment."""


class _Loader(yaml.SafeLoader):
    """Reads plain data (no objects, no code), and refuses a key that a mapping has twice."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        known = set[str]()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value == MERGE:
                continue
            if key.value in known:
                raise yaml.composer.ComposerError(None, None, f"the key {key.value} is there twice", key.start_mark)
            known.add(key.value)
        return node


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping of plain data.

    Raises:
        ConfigError: The file is missing, is not YAML, is not a mapping with text keys, or has a key twice.
    """
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"cannot read the config file {path}: {reason}. Check the path") from None
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path} is not valid YAML{line}: {error.problem}. Correct that line") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: an impossible date
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds a {type(data).__name__}. Write a mapping: key: value lines")
    for key in _keys_that_are_not_text(data):
        raise ConfigError(f"YAML reads a key of {path} as {key!r}. Put the key in quotes")
    return data


def _keys_that_are_not_text(value: object) -> Iterator[object]:
    """Yield such keys at any depth: YAML reads `1:` as a number and `on:` as true. Aliases are visited once."""
    stack, visited = [value], set[int]()
    while stack:
        item = stack.pop()
        if id(item) in visited:
            continue
        visited.add(id(item))
        if isinstance(item, dict):
            yield from (key for key in item if not isinstance(key, str))
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)


def parse_value(text: str) -> Any:
    """Read one value as YAML would: `3` int, `1e-3` float, `true` bool, `[1, 2]` list, else text.

    `010`, `1:30` and `photos #2` are text: one line of the command line has no octal numbers, times or comments.
    """
    if MISREAD.fullmatch(text):
        return text
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: 2026-13-45, 0x_
        return text
    if value == "" and text[:1] in {"|", ">"}:  # YAML starts a block of text so
        return text
    if isinstance(value, datetime.date):  # no key is a date, but a directory may be called 2026-11-26
        return text
    if isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
        try:
            return float(value)
        except ValueError:
            return value
    return value


def parse_text(text: str) -> Any:
    """Read a value that is text, a list of texts or a mapping of them: `no`, `007` and `1e3` stay as they are."""
    if text in {"null", "~"}:
        return None
    if text[:1] not in {"[", "{", "'", '"'}:
        return text
    try:
        return yaml.load(text, yaml.BaseLoader)  # it makes nothing but texts
    except (yaml.YAMLError, RecursionError):
        return text


def parse_options(text: str, texts: Collection[str] = ()) -> dict[str, Any]:
    """Read `key=value,key=value`, as in `vpt:deep=false,num_prompts=10`.

    Args:
        text: The options.
        texts: Keys whose values are text, see `parse_text`.

    Raises:
        ConfigError: An item has no `=` or no key, or a key comes twice.
    """
    options: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in split_items(text))):
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"not an option: {item!r}. Write options as key=value,key=value")
        key = key.strip()
        if key in options:
            raise ConfigError(f"the option {key} is given twice in {text!r}. Leave one out")
        parse = parse_text if key in texts else parse_value
        options[key] = parse(value.strip())
    return options


def split_items(text: str) -> list[str]:
    """Split at commas that are not inside brackets: `a=[1,2],b=3` has two items."""
    items, depth = [""], 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth <= 0:
            items.append("")
        else:
            items[-1] += character
    return items if depth == 0 else text.split(",")


def override(values: Mapping[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """Apply `a.b=c` assignments to a copy of nested plain data.

    Raises:
        ConfigError: An assignment has no `=`, or goes through a value that is not a mapping.
    """
    result = dict(values)
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        *parents, last = path.strip().split(".")
        if not equals or not all((*parents, last)):
            raise ConfigError(f"not an assignment: {assignment!r}. Write it as key.key=value")
        mapping = result
        for key in parents:
            child = mapping.get(key)
            if not isinstance(child, Mapping | None):
                raise ConfigError(f"cannot set {assignment}: {key} is {child!r} and has no keys")
            mapping[key] = dict(child or {})
            mapping = mapping[key]
        mapping[last] = parse_value(text.strip())
    return result
