"""Tuners by name, through the entry-point group `petune.tuners`: listed from metadata, loaded on first use.

`PETUNE_PLUGINS=none` hides every tuner that does not come with petune; `PETUNE_PLUGINS=a,b` shows only those, by the
name of the method or of the package. A plugin cannot take the name of a tuner that comes with petune.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import os
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points, version
from typing import TYPE_CHECKING, Any

from petune.errors import PluginError, UnknownName

if TYPE_CHECKING:
    from petune.tuner import Tuner, TunerConfig

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


def tuners() -> list[TunerRecord]:
    """Every registered tuner, petune's own first, without importing any."""
    points = _points()
    return [TunerRecord(p.name, *_origin(p), p.value, _state(p, points)) for p in points]


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
    found = [p for p in _points() if p.name == name]
    if not found:
        raise UnknownName("method", name, {p.name for p in _points()}, "`petune methods` lists them")
    own = [p for p in found if _origin(p)[0] == OWN]
    if len(found) > 1 and not own:
        owners = " and ".join(f"{_origin(p)[0]} ({p.value})" for p in found)
        raise PluginError(f"the method {name!r} must come from one package, but {owners} both register it; remove one")
    return _load((own or found)[0])


def build_tuner(method: str | Tuner[Any] | TunerConfig, **options: Any) -> Tuner[Any]:
    """A configured tuner.

    Args:
        method: A registered name, a Tuner, or the config of a registered tuner. `family:kind` is the tuner `family`
            with the option `type=kind`, as `peft:ia3`.
        **options: For a name: the tuner's options.

    Raises:
        UnknownName, PluginError: See `load_tuner`.
        ConfigError: An option is unknown or wrong.
    """
    from petune.tuner import Tuner, TunerConfig

    if isinstance(method, Tuner):
        return type(method)(method.config, **options) if options else method
    if isinstance(method, TunerConfig):
        for record in tuners():
            cls = load_tuner(record.name) if record.state == "ok" and record.distribution == OWN else None
            if cls is not None and cls.Config is type(method):
                return cls(method, **options)
        raise UnknownName("method", type(method).__name__, [], "pass the Tuner itself: MyTuner(config)")
    family, colon, kind = method.partition(":")
    cls = load_tuner(family)
    given = {"type": kind, **options} if colon else options
    tuner = cls(cls.Config.build(given, f"the options of {method}"))
    tuner.method = family
    return tuner


def _points() -> list[EntryPoint]:
    allowed = os.environ.get("PETUNE_PLUGINS")
    names = None if allowed is None else {n.strip() for n in allowed.split(",")}
    points = entry_points(group=GROUP)
    kept = [p for p in points if names is None or _origin(p)[0] == OWN or names & {p.name, _origin(p)[0]}]
    unique = {(p.name, p.value, _origin(p)): p for p in kept}  # an editable install can be found twice
    return sorted(unique.values(), key=lambda p: (_origin(p)[0] != OWN, p.name))


def _state(point: EntryPoint, points: list[EntryPoint]) -> str:
    rivals = [p for p in points if p.name == point.name and p is not point]
    if any(_origin(p)[0] == OWN for p in rivals):
        return f"unusable: petune has a method {point.name!r} of its own"
    if rivals and _origin(point)[0] != OWN:
        return "unusable: name is taken twice"
    return "ok" if not (need := _unmet(point)) else f"unusable: it needs {need}"


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


def _origin(point: EntryPoint) -> tuple[str, str]:
    if point.dist is None or point.dist.metadata is None:
        return "?", "?"
    return str(point.dist.metadata["Name"] or "?"), str(point.dist.metadata["Version"] or "?")


def _load(point: EntryPoint) -> type[Tuner[Any]]:
    from petune.tuner import Tuner, TunerConfig

    said = io.StringIO()
    who = "{} {}".format(*_origin(point))
    if need := _unmet(point):
        raise PluginError(f"the method {point.name!r} of {who} needs {need}. Upgrade petune, or use an older {who}")
    try:
        with contextlib.redirect_stdout(said):
            cls = point.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a plugin may call sys.exit at import: it must not end petune
        cause = f"{type(error).__name__}: {error}"
        raise PluginError(
            f"the method {point.name!r} of {who} must be importable from {point.value}, but: {cause}. "
            f"Update or remove {_origin(point)[0]}"
        ) from error
    if not (inspect.isclass(cls) and issubclass(cls, Tuner) and issubclass(cls.Config, TunerConfig)):
        raise PluginError(
            f"the method {point.name!r} of {who} must be a subclass of petune.Tuner with a Config, but "
            f"{point.value} is {cls!r}"
        )
    return cls
