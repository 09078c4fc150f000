"""Typed configuration: frozen pydantic models, YAML in and out, `a.b=c` overrides, problems all at once."""

from __future__ import annotations

import datetime
import difflib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from petune.base.errors import ConfigError, near_names

LONGEST_SHOWN = 120
UNION_MEMBER = re.compile(r"(constrained-\w+|literal\[.*\]|function-.*|float|int|str|bool)")


class Config(BaseModel):
    """Base of every configuration: frozen, unknown keys forbidden, numbers never read from other types."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    def __init__(self, **values: Any) -> None:
        """Validate `values`.

        Raises:
            ConfigError: As `build`.
        """
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_explain(error, type(self), "")) from None

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic would read true as 1."""
        if _truth_for_numbers(cls.model_fields[str(info.field_name)].annotation, value):
            raise ValueError("true and false are no numbers")
        return value

    # So that pydantic validates a configuration inside another one as it does without an __init__: all at once
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def build(cls, values: Mapping[str, Any], source: str = "") -> Self:
        """Validate `values`.

        Args:
            values: Plain data, as read from YAML or the command line.
            source: Where the values come from, for the message.

        Raises:
            ConfigError: With every problem and the near names of unknown keys.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"{source or cls.__name__} must be a mapping of keys to values, not {_shown(values)}")
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise ConfigError(_explain(error, cls, source)) from None

    @classmethod
    def given(cls, config: Self | None, fields: Mapping[str, Any], call: str) -> Self:
        """The `config` that a function was called with, or the one that `fields` make.

        Raises:
            ConfigError: As `build`; or there are both, or `config` is something else.
        """
        if config is None:
            return cls.build(fields, call)
        if not isinstance(config, cls):
            raise ConfigError(f"{call} takes a {cls.__name__} or its keys, not {_shown(config)}")
        if fields:
            raise ConfigError(f"{call} takes a {cls.__name__} or its keys, not both; drop {', '.join(sorted(fields))}")
        return config

    def to_yaml(self) -> str:
        """The complete configuration, defaults included, as YAML that `from_yaml` reads back equal."""
        data = self.model_dump(mode="json")
        text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
        # PyYAML writes some separators (U+0085, U+2028) as they are and reads them as a space: those it must escape
        return text if yaml.safe_load(text) == data else yaml.safe_dump(data, sort_keys=False)


def _truth_for_numbers(kind: Any, value: Any) -> bool:
    """Whether a number is asked for, here or within, and true or false came."""
    members = list(_members(kind))
    if isinstance(value, bool):
        return bool not in members and (int in members or float in members)
    within = [inner for member in members for inner in get_args(member) if inner is not ...]
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return bool(within) and any(_truth_for_numbers(within[-1], item) for item in items)


def _members(kind: Any) -> Iterator[Any]:
    """The types of a union, or the only one."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        yield from _members(inner[0])
    elif _is_union(kind):
        for member in inner:
            yield from _members(member)
    elif origin is Literal:
        yield from map(type, inner)
    else:
        yield kind


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, UnionType)


def expanded(path: str | Path) -> Path:
    """`path` with `~` as the home directory."""
    return Path(os.path.expanduser(path))  # Path.expanduser fails where there is no such user


def user_path(path: Path) -> Path:
    """`path` with `~` as the home directory.

    Raises:
        ValueError: It is no UTF-8, which config.yaml could not hold.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError("a path must be UTF-8, which the files that name it are written in; choose another") from None
    return expanded(path)


UserPath = Annotated[Path, AfterValidator(user_path)]
"""A path of a configuration."""


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping with `safe_load` (no objects, no code).

    Raises:
        ConfigError: The file is missing, is not YAML, or does not hold a mapping whose keys are words.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the config file {path}: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that is none, or nested without end
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a mapping (key: value lines), but holds a {type(data).__name__}")
    for key in _no_words(data):
        raise ConfigError(f"the keys of {path} must be words, but YAML reads one as {key!r}; write it in quotes")
    return data


def _no_words(value: object) -> Iterator[object]:
    """Keys that are no text: YAML reads `1:` as a number and `on:` as true. What an alias repeats is looked at once."""
    waiting, seen = [value], set[int]()
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, dict):
            yield from (key for key in one if not isinstance(key, str))
            waiting.extend(one.values())
        elif isinstance(one, list):
            waiting.extend(one)


def parse_value(text: str) -> Any:
    """Read one override value as YAML would: `3` int, `1e-3` float, `true` bool, `[1, 2]` list, else text."""
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):  # 2026-13-45 is no date, 0x_ no number
        return text
    if isinstance(value, datetime.date):  # no key takes one; a directory may be called 2026-11-26
        return text
    if isinstance(value, str):  # YAML 1.1 reads 1e-3 as text; people mean a number
        try:
            return float(value)
        except ValueError:
            return value
    return value


def parse_options(text: str) -> dict[str, Any]:
    """Read `key=value,key=value`, as in `vpt:deep=false,num_prompts=10`.

    Raises:
        ConfigError: An item has no `=` or no key.
    """
    options: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"options are written key=value,key=value; {item!r} is not of that form")
        options[key.strip()] = parse_value(value.strip())
    return options


def override(values: Mapping[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """Apply `a.b=c` assignments to nested plain data and return the result; `values` is left alone.

    Raises:
        ConfigError: An assignment has no `=`, or goes through a value that is not a mapping.
    """
    result: dict[str, Any] = {k: dict(v) if isinstance(v, Mapping) else v for k, v in values.items()}
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise ConfigError(f"--set takes key.key=value; {assignment!r} is not of that form")
        here = result
        for key in keys[:-1]:
            below = here.get(key)
            if below is None:
                below = {}
            if not isinstance(below, Mapping):
                raise ConfigError(f"--set {assignment}: {key!r} holds {below!r} and has no keys below it")
            here[key] = dict(below)
            here = here[key]
        here[keys[-1]] = parse_value(text.strip())
    return result


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"


def _explain(error: ValidationError, cls: type[BaseModel], source: str) -> str:
    found: dict[str, list[str]] = {}
    came: dict[str, str] = {}
    for item in error.errors(include_url=False):
        *above, last = item["loc"] or (cls.__name__,)
        field = _fields_at(cls, above[:-1]).get(str(above[-1])) if above else None
        # one problem, said by each member
        union = field is not None and _is_union(field.annotation) and UNION_MEMBER.fullmatch(str(last))
        where = ".".join(str(part) for part in (above if union else (*above, last)))
        if item["type"] == "extra_forbidden":
            message = f"no such key{_near_keys(str(last), _fields_at(cls, above))}"
        else:
            message = item["msg"].removeprefix("Value error, ")
            message = f"{message[:1].lower()}{message[1:]}"
            came[where] = "" if item["type"] == "missing" else f" (got {_shown(item['input'])})"
        found.setdefault(where, []).append(message)
    problems = [f"{where}: {' or '.join(dict.fromkeys(said))}{came.get(where, '')}" for where, said in found.items()]
    head = f"{len(problems)} problem{'s' if len(problems) > 1 else ''} in {source or cls.__name__}:"
    return "\n  - ".join([head, *problems])


Fields = Mapping[str, FieldInfo]


def _fields_at(cls: type[BaseModel], path: Iterable[int | str]) -> Fields:
    fields: Fields = cls.model_fields
    for key in path:
        fields = _below(fields[str(key)]) if str(key) in fields else {}
    return fields


def _below(field: FieldInfo) -> Fields:
    kind = field.annotation
    return kind.model_fields if isinstance(kind, type) and issubclass(kind, BaseModel) else {}


def _near_keys(name: str, fields: Fields) -> str:
    """As `near_names`; a key of the mappings below, as `epochs` of `train`, is meant where it is nearer."""
    inner = {last: f"{key}.{last}" for key, field in fields.items() for last in _below(field)}
    near = difflib.get_close_matches(name.casefold(), {*inner, *fields}, n=1, cutoff=0.8)
    return f"; did you mean {inner[near[0]]!r}?" if near and near[0] not in fields else near_names(name, fields)
