"""Typed configurations: frozen pydantic models that report all problems at once and are written as YAML."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError
from pydantic_core import core_schema, to_jsonable_python

from petune.base.errors import ConfigError, Problem, did_you_mean, similar_names
from petune.base.text import plural

MAX_SHOWN = 120


def _check_number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("should be a number")
    return value


NUMBER_CHECK = {"type": "no-info", "function": _check_number}


def _refuse_bools(schema: Any) -> Any:
    """Return a pydantic schema whose numbers refuse bools, which pydantic would read as 0 and 1."""
    if isinstance(schema, list | tuple):
        return type(schema)(_refuse_bools(item) for item in schema)
    if not isinstance(schema, dict) or schema.get("function", {}) == NUMBER_CHECK:
        return schema
    schema = {key: value if key == "default" else _refuse_bools(value) for key, value in schema.items()}
    if schema.get("type") in ("int", "float"):
        return core_schema.no_info_before_validator_function(_check_number, schema)
    return schema


class Config(BaseModel):
    """Base of every configuration: frozen, unknown keys and infinite numbers refused, `true` is not a number."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    def __init__(self, **values: Any) -> None:
        """Validate `values`.

        Raises:
            ConfigError: See `build`.
        """
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _config_error(error, type(self), values, "") from None

    # Lets pydantic validate a nested configuration directly, so that the problems of all levels are reported together
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        """Return the schema of the class, with numbers that refuse `true` and `false`."""
        schema: core_schema.CoreSchema = _refuse_bools(handler(source))
        return schema

    @classmethod
    def build(cls, values: Mapping[str, Any], source: str = "") -> Self:
        """Validate `values`.

        Args:
            values: Plain data, as read from YAML or the command line.
            source: Where the values come from, for the message.

        Raises:
            ConfigError: Lists every problem, and similar names for unknown keys.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"{source or cls.__name__} is not a mapping of keys to values: {shown(values)}")
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise _config_error(error, cls, values, source) from None

    @classmethod
    def from_call(cls, config: Self | None, fields: Mapping[str, Any], call: str) -> Self:
        """Return the `config` passed to a function, or build one from its keyword arguments `fields`.

        Args:
            config: The argument `config` of the function.
            fields: Its remaining keyword arguments.
            call: The function, for the message.

        Raises:
            ConfigError: See `build`; or both were passed, or `config` has another type.
        """
        if config is None:
            return cls.build(fields, call)
        if not isinstance(config, cls):
            raise ConfigError(f"{call}: config is not a {cls.__name__}: {shown(config)}. Pass one, or its keys")
        if fields:
            raise ConfigError(f"{call}: pass a {cls.__name__} or its keys, not both. Drop {', '.join(sorted(fields))}")
        return config

    def plain(self) -> dict[str, Any]:
        """Return all options as JSON data; sets are sorted, so that the result is the same in every process."""
        values = self.model_dump()
        ordered = {k: sorted(v, key=str) if isinstance(v, set | frozenset) else v for k, v in values.items()}
        return dict(to_jsonable_python(ordered))

    def to_yaml(self) -> str:
        """Return the complete configuration, defaults included, as YAML that `build` reads back equal."""
        data = self.model_dump(mode="json")
        text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
        # PyYAML writes U+0085 and U+2028 unescaped but reads them as a space
        return text if yaml.safe_load(text) == data else yaml.safe_dump(data, sort_keys=False)


def shown(value: object, longest: int = MAX_SHOWN) -> str:
    """Return `repr(value)`, shortened for a message."""
    text = repr(value)
    return text if len(text) <= longest else f"{text[:longest]}…"


def _config_error(error: ValidationError, cls: type[BaseModel], values: Mapping[str, Any], source: str) -> ConfigError:
    """Return a ConfigError with one problem per key; the members of a union share one.

    Of a union with a table, whose entries have problems, only these are listed, not that the table is no other member.
    """
    problems: dict[str, Problem] = {}
    items = error.errors(include_url=False)
    paths = [_key_path(item["loc"], item["type"], values) for item in items]
    for item, path in zip(items, paths, strict=True):
        if path and any(len(other) > len(path) and other[: len(path)] == path for other in paths):
            continue
        key = ".".join(map(str, path)) or cls.__name__
        if item["type"] == "extra_forbidden":
            problems[key] = Problem(key, f"no such key: {key}{_suggest_key(path, cls)}", unknown=True)
            continue
        text = item["msg"].removeprefix("Value error, ").removeprefix("Input ").partition(", unable to parse")[0]
        text = f"{text[:1].lower()}{text[1:]}"
        if key in problems:
            before, _, got = problems[key].message.rpartition(" (got ")
            text = text.removeprefix("should be ")
            if text in before:
                continue
            problems[key] = Problem(key, f"{before} or {text} (got {got}")
        elif item["type"] == "missing":
            problems[key] = Problem(key, f"{key}: required")
        else:
            prefix = f"{key}: " if path else ""  # a check of several keys names them itself
            problems[key] = Problem(key, f"{prefix}{text} (got {shown(item['input'])})")
    head = f"{plural(len(problems), 'problem')} in {source or cls.__name__}:"
    return ConfigError("\n  - ".join([head, *(p.message for p in problems.values())]), tuple(problems.values()))


def _key_path(location: Sequence[int | str], kind: str, values: Any) -> list[int | str]:
    """Return the keys in pydantic's error location; it also holds names of union members, which are not in `values`."""
    path: list[int | str] = []
    for number, part in enumerate(location, start=1):
        if isinstance(values, Mapping) and part in values:
            values = values[part]
        elif isinstance(values, list | tuple) and isinstance(part, int):
            values = values[part] if part < len(values) else None
        elif not (kind == "missing" and number == len(location)):
            continue
        path.append(part)
    return path


def _suggest_key(path: Sequence[int | str], cls: type[BaseModel]) -> str:
    """Return a suggestion for an unknown key: a similar one beside it, or one level below (`train.epochs`)."""
    above = "".join(f"{part}." for part in path[:-1])
    siblings = _keys_at(path[:-1], cls)
    nested = {inner: f"{key}.{inner}" for key in siblings for inner in _keys_at([*path[:-1], key], cls)}
    nearest = similar_names(str(path[-1]), {*siblings, *nested}, cutoff=0.8)
    if nearest and nearest[0] not in siblings:
        return f". Did you mean {above}{nested[nearest[0]]}?"
    return did_you_mean(str(path[-1]), siblings, prefix=above)


def _keys_at(path: Iterable[int | str], cls: type[BaseModel]) -> list[str]:
    """Return the keys of the nested configuration at `path`; empty where there is none."""
    model: Any = cls
    for part in path:
        field = model.model_fields.get(str(part))
        model = field.annotation if field else None
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return []
    return list(model.model_fields)


def expand_home(path: str | Path) -> Path:
    """Return `path` with `~` as the home directory."""
    return Path(os.path.expanduser(path))  # Path.expanduser raises for an unknown user


def user_path(path: Path) -> Path:
    """Return `path` with `~` as the home directory.

    Raises:
        ValueError: It is not UTF-8, so config.yaml could not store it.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError("the path is not UTF-8, so config.yaml cannot store it. Use another one") from None
    return expand_home(path)


UserPath = Annotated[Path, AfterValidator(user_path)]
"""The type of a path in a configuration."""
