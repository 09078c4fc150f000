"""Plugins that installed packages register, read from their metadata without importing them.

`PETUNE_PLUGINS=none` hides every plugin that does not come with petune; `PETUNE_PLUGINS=a,b` shows only these, by the
name of the plugin or of the package.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from importlib.metadata import EntryPoint, PackageNotFoundError, distribution, entry_points, version

OWN = "petune"
OWN_REQUIREMENT = re.compile(rf"{OWN}\s*($|[\[(;<>=!~])")
"""A requirement of petune itself. `packaging.requirements` would parse it too, but takes longer to import."""


@dataclass(frozen=True)
class PluginKind:
    """A kind of plugin.

    Attributes:
        group: The entry-point group: `petune.tuners`.
        noun: The word for one in messages: `method`.
        hint: Advice for a name that nobody registers.
    """

    group: str
    noun: str
    hint: str


@dataclass(frozen=True)
class RegisteredPlugin:
    """An entry point and the package that brings it.

    Attributes:
        kind: The kind of plugin.
        point: The entry point; the plugin's name is its left side.
        distribution, version: The package; `?` where its metadata is damaged.
        summary: The package's own description in one line.
    """

    kind: PluginKind
    point: EntryPoint
    distribution: str
    version: str
    summary: str

    @property
    def name(self) -> str:
        """The name of the method, dataset or task."""
        return self.point.name

    @property
    def is_own(self) -> bool:
        """True for a plugin that comes with petune."""
        return self.distribution == OWN


def registered_plugins(kind: PluginKind) -> list[RegisteredPlugin]:
    """Return all registered plugins of a kind, petune's own first, by name."""
    allowed = os.environ.get("PETUNE_PLUGINS")
    names = None if allowed is None else {n.strip() for n in allowed.split(",")}
    packages: dict[int, tuple[str, str, str]] = {}  # metadata is slow to read, so it is read once per package
    plugins: dict[tuple[str, str, str], RegisteredPlugin] = {}
    points = entry_points(group=kind.group)
    for point in points:
        if id(point.dist) not in packages:
            packages[id(point.dist)] = _package_of(point)
        plugin = RegisteredPlugin(kind, point, *packages[id(point.dist)])
        if names is None or plugin.is_own or names & {plugin.name, plugin.distribution}:
            plugins[plugin.name, point.value, plugin.distribution] = plugin  # an editable install can be listed twice
    return sorted(plugins.values(), key=lambda p: (not p.is_own, p.name))


def own_plugin(kind: PluginKind, name: str) -> RegisteredPlugin | None:
    """Return petune's own plugin of that name. Reads one package's metadata, where `registered_plugins` reads all."""
    try:
        points = distribution(OWN).entry_points.select(group=kind.group, name=name)
    except PackageNotFoundError:
        return None
    return next((RegisteredPlugin(kind, point, OWN, "", "") for point in points), None)


def state_of(plugin: RegisteredPlugin, registered: list[RegisteredPlugin]) -> str:
    """Return `ok`, or why the name cannot be used."""
    if plugin.is_own:
        return "ok"
    rivals = [p for p in registered if p.name == plugin.name and p is not plugin]
    if any(p.is_own for p in rivals):
        return f"unusable: petune has a {plugin.kind.noun} {plugin.name!r} of its own"
    if rivals:
        return "unusable: name is taken twice"
    requirement = unmet_requirement(plugin)
    return f"unusable: it needs {requirement}" if requirement else "ok"


def unmet_requirement(plugin: RegisteredPlugin) -> str:
    """Return the petune version that the package asks for if this is another one; empty if it fits or is unknown."""
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    distribution = plugin.point.dist
    requirements = (distribution.requires or []) if distribution is not None else []
    for text in filter(OWN_REQUIREMENT.match, requirements):
        versions = text.removeprefix(OWN).partition(";")[0].rpartition("]")[2].strip(" ()")
        try:
            specifier = SpecifierSet(versions)
        except InvalidSpecifier:
            continue
        if not specifier.contains(version(OWN), prereleases=True):
            return f"{OWN}{specifier}, this is {version(OWN)}"
    return ""


def _package_of(point: EntryPoint) -> tuple[str, str, str]:
    if point.dist is None or point.dist.metadata is None:
        return "?", "?", ""
    metadata = point.dist.metadata
    return str(metadata["Name"] or "?"), str(metadata["Version"] or "?"), str(metadata["Summary"] or "")
