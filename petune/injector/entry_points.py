"""Tuners that installed packages register, read from their metadata without importing them.

`PETUNE_PLUGINS=none` hides every tuner that does not come with petune; `PETUNE_PLUGINS=a,b` shows only these, by the
name of the method or of the package.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from importlib.metadata import EntryPoint, PackageNotFoundError, distribution, entry_points, version

GROUP = "petune.tuners"
OWN = "petune"
OWN_REQUIREMENT = re.compile(rf"{OWN}\s*($|[\[(;<>=!~])")
"""A requirement of petune itself. `packaging.requirements` would parse it too, but takes longer to import."""


@dataclass(frozen=True)
class RegisteredTuner:
    """An entry point and the package that brings it.

    Attributes:
        name: The method's name, the left side of the entry point.
        point: The entry point.
        distribution, version: The package; `?` where its metadata is damaged.
        summary: The package's own description in one line.
    """

    name: str
    point: EntryPoint
    distribution: str
    version: str
    summary: str

    @property
    def is_own(self) -> bool:
        """True for a tuner that comes with petune."""
        return self.distribution == OWN


def registered_tuners() -> list[RegisteredTuner]:
    """Return all registered tuners, petune's own first, by name."""
    allowed = os.environ.get("PETUNE_PLUGINS")
    names = None if allowed is None else {n.strip() for n in allowed.split(",")}
    packages: dict[int, tuple[str, str, str]] = {}  # metadata is slow to read, so it is read once per package
    tuners: dict[tuple[str, str, str], RegisteredTuner] = {}
    points = entry_points(group=GROUP)
    for point in points:
        if id(point.dist) not in packages:
            packages[id(point.dist)] = _package_of(point)
        tuner = RegisteredTuner(point.name, point, *packages[id(point.dist)])
        if names is None or tuner.is_own or names & {tuner.name, tuner.distribution}:
            tuners[tuner.name, point.value, tuner.distribution] = tuner  # an editable install can be listed twice
    return sorted(tuners.values(), key=lambda t: (not t.is_own, t.name))


def own_tuner(name: str) -> RegisteredTuner | None:
    """Return petune's own tuner of that name. Reads one package's metadata, where `registered_tuners` reads all."""
    try:
        points = distribution(OWN).entry_points.select(group=GROUP, name=name)
    except PackageNotFoundError:
        return None
    return next((RegisteredTuner(name, point, OWN, "", "") for point in points), None)


def state_of(tuner: RegisteredTuner, registered: list[RegisteredTuner]) -> str:
    """Return `ok`, or why the name cannot be used."""
    if tuner.is_own:
        return "ok"
    rivals = [t for t in registered if t.name == tuner.name and t is not tuner]
    if any(t.is_own for t in rivals):
        return f"unusable: petune has a method {tuner.name!r} of its own"
    if rivals:
        return "unusable: name is taken twice"
    requirement = unmet_requirement(tuner)
    return f"unusable: it needs {requirement}" if requirement else "ok"


def unmet_requirement(tuner: RegisteredTuner) -> str:
    """Return the petune version that the package asks for if this is another one; empty if it fits or is unknown."""
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    distribution = tuner.point.dist
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
