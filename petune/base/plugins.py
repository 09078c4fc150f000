"""Import the class that a package registers, and name the package in every error of it.

A plugin class names the class of its options once, as the type parameter of its base: `class SSF(Tuner[SSFConfig])`.
"""

from __future__ import annotations

import contextlib
import inspect
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, get_args, get_origin

from petune.base.entry_points import (
    OWN,
    PluginKind,
    RegisteredPlugin,
    own_plugin,
    registered_plugins,
    state_of,
    unmet_requirement,
)
from petune.base.errors import PetuneError, PluginError, UnknownName

T = TypeVar("T")


@dataclass(frozen=True)
class PluginRecord:
    """A tuner or a task as its package's metadata describes it, without an import.

    Attributes:
        name: The name of the method or task, the left side of the entry point.
        distribution, version: The package that brings it.
        target: `module:class`, the right side.
        state: `ok`, or why the name cannot be used.
        package_summary: The package's own description in one line.
    """

    name: str
    distribution: str
    version: str
    target: str
    state: str
    package_summary: str = ""

    @property
    def is_own(self) -> bool:
        """True for what comes with petune."""
        return self.distribution == OWN


def list_plugins(kind: PluginKind) -> list[PluginRecord]:
    """List every registered plugin of a kind, petune's own first, without importing any."""
    registered = registered_plugins(kind)
    return [
        PluginRecord(p.name, p.distribution, p.version, p.point.value, state_of(p, registered), p.summary)
        for p in registered
    ]


def load_plugin(kind: PluginKind, name: str, base: type[T], config_base: type) -> type[T]:
    """Import the class that is registered as `name`.

    Args:
        kind: The kind of plugin.
        name: Its name.
        base: The public class that every plugin of the kind derives from: `Tuner`.
        config_base: The class that its `Config` derives from: `TunerConfig`.

    Raises:
        UnknownName: No plugin of the kind has that name.
        PluginError: Two packages claim the name, or the package cannot be loaded; it and the cause are named.
    """
    own = own_plugin(kind, name)
    if own is not None:
        return _import(own, base, config_base)
    registered = registered_plugins(kind)
    candidates = [plugin for plugin in registered if plugin.name == name]
    if not candidates:
        raise UnknownName(kind.noun, name, {plugin.name for plugin in registered}, kind.hint)
    if len(candidates) > 1:
        owners = " and ".join(f"{plugin.distribution} ({plugin.point.value})" for plugin in candidates)
        raise PluginError(f"{owners} both register the {kind.noun} {name!r}. Remove one of the two packages")
    return _import(candidates[0], base, config_base)


@contextlib.contextmanager
def plugin_errors(kind: PluginKind, name: str | None, cls: type, phase: str) -> Iterator[None]:
    """Turn an unexpected error of a plugin into a PluginError that names its package.

    petune's own errors pass, and so does what a built-in or an unregistered class raises. An exit is an error of the
    plugin, too: it would end petune without a word.

    Args:
        kind: The kind of plugin.
        name: The name that the object was built by.
        cls: Its class.
        phase: What was being done, for the message: `was attached`.

    Raises:
        PluginError: The plugin raised something else than a PetuneError.
    """
    try:
        yield
    except (PetuneError, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        plugin = next((p for p in registered_plugins(kind) if p.name == name and not p.is_own), None)
        if plugin is None or cls.__module__.partition(".")[0] == OWN:
            raise
        raise PluginError(
            f"the {kind.noun} {name!r} of {plugin.distribution} {plugin.version} failed when it {phase}: "
            f"{type(error).__name__}: {error}. Update or remove {plugin.distribution}"
        ) from error


def set_config_class(cls: Any, base: type, config_base: type) -> None:
    """Set `cls.Config` to the type parameter of its base class, for `__init_subclass__` of `base`.

    Args:
        cls: A new subclass of `base`.
        base: The public, generic class: `Tuner`.
        config_base: The class of options that its parameter is bound to: `TunerConfig`.

    Raises:
        TypeError: The class names no config class.
    """
    bases = [each for each in cls.__dict__.get("__orig_bases__", ()) if isinstance(get_origin(each), type)]
    parameters = [parameter for each in bases if issubclass(get_origin(each), base) for parameter in get_args(each)]
    config = next((p for p in parameters if isinstance(p, type) and issubclass(p, config_base)), None)
    if config is not None and "Config" not in cls.__dict__:
        cls.Config = config
    is_generic = any(isinstance(p, TypeVar) for p in parameters)
    if not is_generic and not hasattr(cls, "Config"):
        public = f"petune.{base.__name__}"
        raise TypeError(
            f"{cls.__name__} names no config class. Write class {cls.__name__}({public}[MyConfig]), or "
            f"{public}[petune.{config_base.__name__}] if it has no options"
        )


def _import(plugin: RegisteredPlugin, base: type[T], config_base: type) -> type[T]:
    point = plugin.point
    subject = f"the {plugin.kind.noun} {plugin.name!r} of {plugin.distribution} {plugin.version}"
    requirement = "" if plugin.is_own else unmet_requirement(plugin)
    if requirement:
        raise PluginError(f"{subject} needs {requirement}. Upgrade petune, or use an older {plugin.distribution}")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # stdout is for data
            cls = point.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a plugin may call sys.exit at import: it must not end petune
        raise PluginError(
            f"{subject} cannot be imported from {point.value}: {type(error).__name__}: {error}. Update or remove "
            f"{plugin.distribution}"
        ) from error
    has_config = issubclass(getattr(cls, "Config", object), config_base)
    if not (has_config and inspect.isclass(cls) and issubclass(cls, base)):
        raise PluginError(
            f"{subject} is registered as {point.value}, which is no subclass of petune.{base.__name__} with a config "
            f"class. Update or remove {plugin.distribution}"
        )
    return cls
