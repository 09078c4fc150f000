"""Tuners by name, through the entry-point group `petune.tuners`: listed from metadata, loaded on first use.

`PETUNE_PLUGINS=none` hides every tuner that does not come with petune; `PETUNE_PLUGINS=a,b` shows only those, by the
name of the method or of the package. A plugin cannot take the name of a tuner that comes with petune.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points, version
from typing import TYPE_CHECKING, Any

from petune.base.errors import ConfigError, PetuneError, PluginError, UnknownName, did_you_mean

if TYPE_CHECKING:
    from petune.injector.tuner import Tuner, TunerConfig

GROUP = "petune.tuners"
OWN = "petune"


@dataclass(frozen=True)
class TunerRecord:
    """What the metadata says of a registered tuner; nothing was imported to learn it.

    Attributes:
        name: The method's name, the left side of the entry point.
        distribution, version: The package that brings it.
        target: `module:class`, the right side.
        state: `ok`, or why the name cannot be used.
    """

    name: str
    distribution: str
    version: str
    target: str
    state: str


def list_tuners() -> list[TunerRecord]:
    """Every registered tuner, petune's own first, without importing any."""
    found = _registered()
    return [TunerRecord(r.name, r.distribution, r.version, r.point.value, _state(r, found)) for r in found]


def check_loads(record: TunerRecord) -> str:
    """`ok`, or why the record's tuner cannot be used; imports it, unless its metadata says so already."""
    if record.state != "ok":
        return record.state
    try:
        load_tuner(record.name)
    except PluginError as error:
        return str(error)
    return "ok"


def load_tuner(name: str) -> type[Tuner[Any]]:
    """The tuner class registered as `name`, imported now.

    Raises:
        UnknownName: No tuner of that name.
        PluginError: Two packages claim the name, or the package cannot be loaded; it and the cause are named.
    """
    registered = _registered()
    found = [r for r in registered if r.name == name]
    if not found:
        raise UnknownName("method", name, {r.name for r in registered}, "`petune methods` lists them")
    own = [r for r in found if r.distribution == OWN]
    if len(found) > 1 and not own:
        owners = " and ".join(f"{r.distribution} ({r.point.value})" for r in found)
        raise PluginError(f"the method {name!r} must come from one package, but {owners} both register it; remove one")
    return _load((own or found)[0])


def build_tuner(method: str | Tuner[Any] | TunerConfig, **options: Any) -> Tuner[Any]:
    """Build a configured tuner.

    Args:
        method: A registered name, a Tuner, or the config of a registered tuner. A name may hold options, as
            `vpt:deep=false`; `family:kind` is the tuner `family` with the option `type=kind`, as `peft:ia3`.
        **options: The tuner's options, where `method` is a name.

    Raises:
        UnknownName, PluginError: See `load_tuner`.
        ConfigError: An option is unknown, wrong or given twice.
    """
    from petune.injector.tuner import Tuner, TunerConfig

    if isinstance(method, Tuner):
        return type(method)(method.config, **options) if options else method
    if isinstance(method, TunerConfig):
        for record in list_tuners():
            cls = load_tuner(record.name) if record.state == "ok" and record.distribution == OWN else None
            if cls is not None and cls.Config is type(method):
                tuner = cls(method, **options)
                tuner.method = record.name
                return tuner
        raise UnknownName("method", type(method).__name__, [], "Pass the Tuner itself: MyTuner(config)")
    if not isinstance(method, str) or not method:
        raise UnknownName("method", str(method), {t.name for t in list_tuners()}, "Pass a name, a Tuner or its config")
    method, given = parse_method(method)
    twice = given.keys() & options.keys()
    if twice:
        raise ConfigError(f"{', '.join(sorted(twice))} is given twice, in the method's name and as a keyword")
    options = {**given, **options}
    family, colon, kind = method.partition(":")
    cls = load_tuner(family)
    if colon and "type" not in cls.Config.model_fields:
        known = cls.Config.model_fields
        option, near = (kind, "") if kind in known else ("OPTION", did_you_mean(kind, known))
        raise ConfigError(f"options are written {family}:{option}=VALUE, but the method is {method!r}{near}")
    given = {"type": kind, **options} if colon else options
    config = cls.Config.build(given, f"the options of {method}")
    with blamed(family, cls, "was made"):
        tuner = cls(config)
    tuner.method = family
    return tuner


def parse_method(text: str) -> tuple[str, dict[str, Any]]:
    """Split a method into its name and options: `vpt:deep=false` is `("vpt", {"deep": False})`.

    A name may hold a colon itself, as `peft:ia3` does.

    Raises:
        ConfigError: An option is not of the form key=value.
    """
    from petune.base.yaml_values import parse_options

    name, colon, options = text.rpartition(":")
    if colon and "=" in options:
        return name, parse_options(options)
    return text, {}


@contextlib.contextmanager
def blamed(method: str | None, cls: type[Tuner[Any]], when: str) -> Iterator[None]:
    """What a registered tuner of another package raises, but for petune's own errors, is that package's to mend.

    Raises:
        PluginError: It raised; the method, its package and the error are named.
    """
    try:
        yield
    except PetuneError:
        raise
    except Exception as error:
        origin = next((one for one in list_tuners() if one.name == method and one.distribution != OWN), None)
        if origin is None or cls.__module__.partition(".")[0] == OWN:
            raise
        raise PluginError(
            f"the method {method!r} of {origin.distribution} {origin.version} failed when it {when}: "
            f"{type(error).__name__}: {error}. Update or remove {origin.distribution}"
        ) from error


@dataclass(frozen=True)
class _Registered:
    """An entry point and who brings it; metadata is slow to read, so it is read once a distribution."""

    name: str
    point: EntryPoint
    distribution: str
    version: str


def _registered() -> list[_Registered]:
    allowed = os.environ.get("PETUNE_PLUGINS")
    names = None if allowed is None else {n.strip() for n in allowed.split(",")}
    origins: dict[int, tuple[str, str]] = {}
    found: dict[Any, _Registered] = {}
    points = entry_points(group=GROUP)
    for point in points:
        if id(point.dist) not in origins:
            origins[id(point.dist)] = _origin(point)
        one = _Registered(point.name, point, *origins[id(point.dist)])
        if names is None or one.distribution == OWN or names & {one.name, one.distribution}:
            found[one.name, point.value, one.distribution] = one  # an editable install can be found twice
    return sorted(found.values(), key=lambda r: (r.distribution != OWN, r.name))


def _origin(point: EntryPoint) -> tuple[str, str]:
    if point.dist is None or point.dist.metadata is None:
        return "?", "?"
    metadata = point.dist.metadata
    return str(metadata["Name"] or "?"), str(metadata["Version"] or "?")


def _state(one: _Registered, registered: list[_Registered]) -> str:
    rivals = [r for r in registered if r.name == one.name and r is not one]
    if one.distribution == OWN:
        return "ok"
    if any(r.distribution == OWN for r in rivals):
        return f"unusable: petune has a method {one.name!r} of its own"
    if rivals:
        return "unusable: name is taken twice"
    return "ok" if not (need := _unmet(one.point)) else f"unusable: it needs {need}"


def _unmet(point: EntryPoint) -> str:
    """The petune that the package asks for, if this is another; empty if all is well or unknown."""
    from packaging.requirements import InvalidRequirement, Requirement

    for text in (point.dist.requires or []) if point.dist is not None else []:
        try:
            need = Requirement(text)
        except InvalidRequirement:
            continue
        if need.name == OWN and not need.specifier.contains(version(OWN), prereleases=True):
            return f"{OWN}{need.specifier}, this is {version(OWN)}"
    return ""


def _load(one: _Registered) -> type[Tuner[Any]]:
    from petune.injector.tuner import Tuner, TunerConfig

    said = io.StringIO()
    point, who = one.point, f"{one.distribution} {one.version}"
    if one.distribution != OWN and (need := _unmet(point)):
        raise PluginError(f"the method {one.name!r} of {who} needs {need}. Upgrade petune, or use an older {who}")
    try:
        with contextlib.redirect_stdout(said):
            cls = point.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a plugin may call sys.exit at import: it must not end petune
        cause = f"{type(error).__name__}: {error}"
        raise PluginError(
            f"the method {one.name!r} of {who} must be importable from {point.value}, but: {cause}. "
            f"Update or remove {one.distribution}"
        ) from error
    if not (inspect.isclass(cls) and issubclass(cls, Tuner) and issubclass(cls.Config, TunerConfig)):
        raise PluginError(
            f"the method {one.name!r} of {who} must be a subclass of petune.Tuner with a Config, but "
            f"{point.value} is {cls!r}"
        )
    return cls
