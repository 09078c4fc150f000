"""Merge --config, flags and --set into the values of a configuration: defaults < --config < flags < --set."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

from petune.base.errors import UsageError
from petune.base.imports import quick_imports
from petune.cli.flags import FLAGS, keyword
from petune.cli.options import Assignments, ConfigFile, user_path


@dataclass(frozen=True)
class Settings:
    """Configuration values that a command line sets.

    Attributes:
        config: A YAML file to start from.
        flags: The flags that were given, by dotted key.
        assignments: The `key=value` of every --set, which override the rest.
    """

    config: Path | None
    flags: Mapping[str, Any]
    assignments: tuple[str, ...]

    def values(self, own_keys: Collection[str] | None = None) -> dict[str, Any]:
        """Return the values to build a configuration from.

        Args:
            own_keys: The keys of a configuration of several runs, where all other keys belong to the section `run`;
                None for the configuration of one run.

        Raises:
            UsageError: The file gives a key twice, or a key goes through a value that has no keys.
            ConfigError: The file cannot be read, or a --set is malformed.
        """
        from petune.base.yaml_values import override
        from petune.runner.migrations import read_config

        def nested(key: str) -> str:
            return key if own_keys is None or first_part(key) in own_keys else f"run.{key}"

        values: dict[str, Any] = {}
        if self.config is not None:
            for key, value in read_config(user_path(self.config)).items():
                inserted: dict[str, Any] = {}
                _insert(inserted, nested(key), value)
                _merge(values, inserted, self.config)
        for key, value in self.flags.items():
            _insert(values, nested(key), value)
        return override(values, [nested(assignment) for assignment in self.assignments])

    def config_directory(self, name: str, marker: str) -> Path | None:
        """Return the directory of --config if a comparison or sweep wrote it there, to resume it; else None.

        Args:
            name: The name of the configuration file in such a directory.
            marker: Another file that such a directory has.
        """
        if self.config is None or "output" in self.flags or "output" in self.assigned:
            return None
        file = user_path(self.config)
        return file.parent if file.name == name and (file.parent / marker).is_file() else None

    def seeds(self, text: str | None) -> tuple[int, ...] | None:
        """Return the seeds of `--seeds`; None without it.

        Raises:
            UsageError: It is not a list of integers, or --seed is given as well.
        """
        if text is None:
            return None
        if "seed" in self.flags or "seed" in self.assigned:
            raise UsageError("give --seed for one run or --seeds for several, not both")
        return parse_seeds(text)

    def check_given_once(self, given: Mapping[str, str]) -> None:
        """Check that --set gives no key that an argument or flag of the command gives too.

        Args:
            given: The argument or flag that gives each key, as `{"trials": "--trials"}`.

        Raises:
            UsageError: A key is given twice.
        """
        for key, name in given.items():
            if key in self.assigned:
                raise UsageError(f"{name} and --set {key} are both given. Leave one out")

    def check_no_effect(self, keys: Collection[str], advice: str) -> None:
        """Check that --set gives no key that the command sets itself.

        Args:
            keys: Such keys.
            advice: Which command it is and what to do, for the message.

        Raises:
            UsageError: --set gives one.
        """
        unused = self.assigned.intersection(keys)
        if unused:
            raise UsageError(f"--set {min(unused)} has no effect in {advice}")

    @property
    def assigned(self) -> set[str]:
        """Return the dotted keys that --set gives."""
        return {assignment.partition("=")[0].strip() for assignment in self.assignments}

    @property
    def source(self) -> str:
        """Return where the values come from, for messages."""
        return f"{self.config} and the command line" if self.config else "the command line"


def configured(
    *, without: tuple[str, ...] = (), only: tuple[str, ...] = (), defaults: Mapping[str, str] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace a command's parameter `settings` by the shared flags, --config and --set.

    Args:
        without: Flags that the command does not have.
        only: The only flags that it has; empty means all.
        defaults: The command's own defaults in words, by flag.
    """
    flags = [f for f in FLAGS if f.name not in without and (not only or f.name in only)]
    own_defaults = defaults or {}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters
        parameters = [p for p in own.values() if p.name != "settings" and p.kind is not p.KEYWORD_ONLY]
        parameters += [flag.option(own_defaults.get(flag.name)) for flag in flags]
        parameters += [keyword("config", ConfigFile), keyword("set", Assignments)]
        parameters += [p for p in own.values() if p.kind is p.KEYWORD_ONLY]

        @wraps(command)
        def typed(**arguments: Any) -> None:
            values = {flag.key: arguments.pop(flag.parameter) for flag in flags}
            given = {key: value for key, value in values.items() if value is not None and value is not False}
            given |= {key: user_path(value) for key, value in given.items() if isinstance(value, Path)}
            settings = Settings(arguments.pop("config"), given, tuple(arguments.pop("set") or ()))
            _check_methods(given, arguments)
            with quick_imports():
                import torch  # noqa: F401  each of these commands needs it
            command(settings=settings, **arguments)

        typed.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        typed.__annotations__ = {p.name: p.annotation for p in parameters}
        del typed.__wrapped__  # typer would follow it to the command without flags
        return typed

    return decorate


def _check_methods(flags: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """Refuse unknown names of methods before torch is imported, which takes seconds."""
    from petune.injector.registry import check_registered

    given = [flags.get("method"), arguments.get("method"), *(arguments.get("methods") or ())]
    for method in filter(None, given):
        check_registered(method)


def parse_seeds(text: str) -> tuple[int, ...]:
    """Parse `0,1,2` as `(0, 1, 2)`.

    Raises:
        UsageError: It is not a list of integers.
    """
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise UsageError(f"--seeds needs comma-separated integers, e.g. 0,1,2; got {text!r}") from None


def first_part(key: str) -> str:
    """Return the first part of a dotted key, or of `key=value`."""
    return key.partition("=")[0].partition(".")[0].strip()


def _insert(values: dict[str, Any], path: str, value: Any) -> None:
    *sections, last = path.split(".")
    for key in sections:
        section = values.get(key)
        if section is not None and not isinstance(section, Mapping):
            raise UsageError(f"cannot set {path}: {key!r} is {section!r}, not a section with keys")
        values[key] = dict(section or {})
        values = values[key]
    values[last] = value


def _merge(values: dict[str, Any], given: Mapping[str, Any], file: Path, above: str = "") -> None:
    """Add values of a file: sections merge, as `train:` and `run.train:` of a comparison do; other keys come once."""
    for key, value in given.items():
        old = values.get(key)
        is_section = isinstance(old, Mapping | None) and isinstance(value, Mapping | None)
        if key in values and not (is_section and (old or value)):
            raise UsageError(f"{file} gives {above}{key} twice: {old!r} and {value!r}. Remove one of them")
        if isinstance(old, Mapping):
            values[key] = dict(old)
            _merge(values[key], value or {}, file, f"{above}{key}.")
        else:
            values[key] = value
