"""Origin of the numbers in a section: machine, versions, commit, command."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from petune.runner.comparison import Origin
from petune.runner.report.tables import seeds_by_method


def facts_of(provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return machine, versions and commit, as far as they are known."""
    git, versions = provenance.get("git") or {}, provenance.get("versions") or {}
    changes = " with uncommitted changes" if git.get("dirty") else ""
    values = {
        "device": provenance.get("device"),
        "threads": provenance.get("threads"),
        "precision": provenance.get("precision"),
        "micro-batch": provenance.get("micro_batch_size"),
        "commit": f"{git['commit']}{changes}" if git.get("commit") else None,
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "python": provenance.get("python"),
        "platform": provenance.get("platform"),
    }
    return [(name, str(value)) for name, value in values.items() if value]


def facts_of_origins(origins: Sequence[Origin]) -> list[tuple[str, str]]:
    """Return the facts of each origin, after the runs that were measured there."""
    facts = []
    for origin in origins:
        facts += [("runs", seeds_by_method(origin.runs)), *facts_of(origin.provenance)]
    return facts


def commands_of(provenance: Mapping[str, Any]) -> list[str]:
    """Return the command that made a result, if it is known."""
    words = provenance.get("argv") or []
    return [shlex.join(map(str, words))] if words else []
